"""Ways to combine the searches for a query and for each of its texts.

The mean of vectors is one search (`vectors.query.expanded_query`). Here are the others: as many
searches as there are texts and one for the query, whose results are fused. A query with several
relevant documents, each near another passage, has no one vector that is near them all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MEAN = "mean"  # The mean of vectors; one search.
DEV = "dev"  # The best of all of them on the dev queries.
_RRF = 60.0  # As in `ranking.stages.reciprocal_rank_fusion`.

SearchFunction = Callable[[Any, int], tuple[np.ndarray, np.ndarray]]  # As `search.Index.search`.


@dataclasses.dataclass(frozen=True)
class Found:
    """What the searches of one query have found between them, the query's own being the first.

    Attributes:
        rows: [documents] rows of the corpus that any of them found, rising.
        scores: [searches, documents]; by vectors each document's with each of them, whether that
            has found it or not; by words scaled from 0 to 1 within a search, 0 where it has not.
        ranks: [searches, documents] from 1; 0 where the search has not found it.
    """

    rows: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray


def maximum(found: Found, weights: np.ndarray) -> np.ndarray:
    """w s(query) + (1 - w) max of s(text) over the texts, w being the query's weight."""
    own, *texts = found.scores
    return weights[0] * own + (1 - weights[0]) * np.max(texts, axis=0) if texts else own


def mean_score(found: Found, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of scores that are scaled from 0 to 1 within each search.

    Unscaled scores of unit vectors would rank as the mean of the vectors does. Scaled as
    `ranking.stages.interpolate` does, over all documents that any of the searches found.
    """
    return weights @ scaled(found.scores)


def reciprocal_ranks(found: Found, weights: np.ndarray) -> np.ndarray:
    """The weighted sum of 1 / (60 + rank) over the searches that found the document."""
    return weights @ np.where(found.ranks > 0, 1 / (_RRF + found.ranks), 0.0)


# (what was found, weights [searches] that add up to 1) to scores [documents].
COMBINES: dict[str, Callable[[Found, np.ndarray], np.ndarray]] = {
    "max": maximum,
    "mean-score": mean_score,
    "rrf": reciprocal_ranks,
}
WAYS = (MEAN, *COMBINES)


def scaled(scores: np.ndarray) -> np.ndarray:
    """Scores [..., documents] from 0 to 1 along the last axis; 1 where all are the same."""
    if not scores.shape[-1]:
        return scores
    low, high = scores.min(-1, keepdims=True), scores.max(-1, keepdims=True)
    return np.where(high > low, (scores - low) / np.where(high > low, high - low, 1.0), 1.0)


def text_weights(query_weight: float, texts: int) -> np.ndarray:
    """Weights of a query and its texts, which share alike what the query leaves; all without."""
    return np.array([query_weight, *[(1 - query_weight) / texts] * texts] if texts else [1.0])


def found_by_vectors(
    search: SearchFunction, documents: Any, asked: Sequence[np.ndarray], depth: int
) -> list[Found]:
    """What is found for each query, whose own vector and those of its texts are [searches, dim].

    Args:
        search: Over the corpus.
        documents: The corpus' vectors, [documents, dim], which may be memory-mapped: those of each
            query's results are read, so that every document has all its exact scores.
        asked: A query's vectors each.
        depth: Documents that a search finds.
    """
    _, rows = search(np.concatenate(asked), depth)
    several = []
    for vectors, ranked in zip(asked, _split(rows, asked), strict=True):
        union, ranks = ranks_of(list(ranked))
        scores = vectors.astype(np.float64) @ np.asarray(documents[union], np.float64).T
        several.append(Found(union, scores, ranks))
    return several


def found_by_words(
    search: SearchFunction, asked: Sequence[Sequence[str]], depth: int
) -> list[Found]:
    """What BM25 finds for each query's own words and for those of each of its texts.

    Scores of searches for more or fewer words are no measure of one another, so that they are
    scaled within each; documents without a word in common are not found.
    """
    scores, rows = search([text for texts in asked for text in texts], depth)
    several = []
    for each, ranked in zip(_split(scores, asked), _split(rows, asked), strict=True):
        held = [r[s > 0] for s, r in zip(each, ranked, strict=True)]
        union, ranks = ranks_of(held)
        values = np.zeros(ranks.shape)
        for value, s, r in zip(values, each, held, strict=True):
            if len(r):
                value[np.searchsorted(union, r)] = scaled(s[s > 0].astype(np.float64))
        several.append(Found(union, values, ranks))
    return several


def combined(
    several: Sequence[Found], weights: Sequence[np.ndarray], how: str, depth: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Scores and rows of the best documents of each query, as a search has them, but ragged.

    Args:
        several: What was found for each query.
        weights: What each query's searches count.
        how: A key of `COMBINES`.
        depth: Documents a query at most.
    """
    scores, rows = [], []
    for found, weight in zip(several, weights, strict=True):
        fused = COMBINES[how](found, weight)
        best = np.argsort(-fused, kind="stable")[:depth]
        scores.append(fused[best])
        rows.append(found.rows[best])
    return scores, rows


def _split(values: np.ndarray, asked: Sequence[Sequence[Any]]) -> list[np.ndarray]:
    """Values [searches of all queries, depth] by query."""
    return np.split(values, np.cumsum([len(several) for several in asked])[:-1])


def ranks_of(ranked: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows that any search found, rising, and each search's ranks of them."""
    union = np.unique(np.concatenate(ranked))
    ranks = np.zeros((len(ranked), len(union)), np.int32)
    for rank, rows in zip(ranks, ranked, strict=True):
        rank[np.searchsorted(union, rows)] = np.arange(1, len(rows) + 1)
    return union, ranks
