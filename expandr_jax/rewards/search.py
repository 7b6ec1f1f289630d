"""What a candidate is worth as the expansion of its query's search: in the corpus, in a sample."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.rewards import ranks as rewards
from expandr_jax.search import Index

BLOCK_ROWS = 8192  # Expanded queries whose results are in memory at once.


@dataclasses.dataclass(frozen=True)
class Judged:
    """The relevant documents of some queries.

    Attributes:
        queries: Ids of the queries.
        documents: [queries, count] rows of the index, the first one's grade the highest; -1 fills.
        grades: [queries, count] relevance; 0 fills.
    """

    queries: Sequence[str]
    documents: np.ndarray
    grades: np.ndarray


def judged_documents(
    data: TrainingData, queries: Sequence[str], rows: Mapping[str, int], *, split: str = "train"
) -> Judged:
    """The relevant documents of a split's queries.

    Args:
        data: Has the judgements.
        queries: Ids.
        rows: Document id to its row in the index.
        split: Whose judgements.
    """
    positives = [data.positives(query, split) for query in queries]
    shape = len(queries), max(map(len, positives), default=1)
    documents, grades = np.full(shape, -1), np.zeros(shape)
    for row, (query, ids) in enumerate(zip(queries, positives, strict=True)):
        judged = data.collection.qrels[split][query]
        documents[row, : len(ids)] = [rows[document] for document in ids]
        grades[row, : len(ids)] = [judged[document] for document in ids]
    return Judged(queries, documents, grades)


@dataclasses.dataclass(frozen=True)
class Results:
    """What was found for some expanded queries.

    Attributes:
        scores: [queries, candidates, depth] of the documents found, best first.
        found: [queries, candidates, depth] their rows in the index; -1 fills.
        documents: [queries, count] the relevant ones, as in `Judged`.
        grades: [queries, count] their relevance.
    """

    scores: np.ndarray
    found: np.ndarray
    documents: np.ndarray
    grades: np.ndarray

    def ranked(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ranks and grades [queries, candidates, count] of the first relevant documents, or all."""
        queries, candidates, depth = self.found.shape
        documents = np.repeat(self.documents[:, :count], candidates, axis=0)
        rank = rewards.ranks_in_results(self.found.reshape(-1, depth), documents)
        rank = rank.reshape(queries, candidates, -1)
        return rank, np.broadcast_to(self.grades[:, None, : rank.shape[-1]], rank.shape)

    def average_precision(self) -> np.ndarray:
        """Their average precision: [queries, candidates]."""
        rank, grades = self.ranked()
        return rewards.average_precision(rank, grades > 0)

    def softmax_share(self, temperature: float) -> np.ndarray:
        """The relevant documents' share of the softmax: [queries, candidates]."""
        queries, candidates, depth = self.found.shape
        scores, found = (x.reshape(-1, depth) for x in (self.scores, self.found))
        documents = np.repeat(self.documents, candidates, axis=0)
        share = rewards.softmax_share(scores, found, documents, temperature)
        return share.reshape(queries, candidates)


# What a search is worth: (results, temperature) -> [queries, candidates].
SEARCH_MEASURES: dict[str, Callable[[Results, float], np.ndarray]] = {
    "reciprocal_rank": lambda results, _: rewards.reciprocal_rank(results.ranked(1)[0][..., 0]),
    "ndcg": lambda results, _: rewards.ndcg(*results.ranked()),
    "average_precision": lambda results, _: results.average_precision(),
    "softmax_share": Results.softmax_share,
}


def blocks(judged: Judged, candidates: int) -> Iterator[tuple[slice, Judged]]:
    """Parts of the queries whose results may be in memory at once."""
    rows = max(1, BLOCK_ROWS // max(1, candidates))
    for start in range(0, len(judged.queries), rows):
        part = slice(start, start + rows)
        documents, grades = judged.documents[part], judged.grades[part]
        yield part, Judged(judged.queries[part], documents, grades)


def search_dense(index: Index, vectors: np.ndarray, depth: int, judged: Judged) -> Results:
    """Searches an index of vectors with [queries, candidates, dim] of them."""
    queries, candidates, width = vectors.shape
    scores, found = index.search(vectors.reshape(-1, width), depth)
    shape = queries, candidates, -1
    return Results(scores.reshape(shape), found.reshape(shape), judged.documents, judged.grades)


def corpus_reward(config: Any, index: Index, fused: np.ndarray, judged: Judged) -> np.ndarray:
    """`reward.corpus_measure` of each expanded query's search: [queries, candidates] float64.

    Args:
        config: The whole config.
        index: The corpus's.
        fused: [queries, candidates, dim] a query's vector with each of its candidates.
        judged: The same queries' relevant documents.
    """
    settings, result = config.reward, np.zeros(fused.shape[:2])
    measure = SEARCH_MEASURES[settings.corpus_measure]
    for part, own in blocks(judged, fused.shape[1]):
        results = search_dense(index, fused[part], settings.depth, own)
        result[part] = measure(results, settings.corpus_temperature)
    return result


def group_reward(config: Any, vectors: np.ndarray, fused: np.ndarray, judged: Judged) -> np.ndarray:
    """`rewards.group_ndcg` over sets drawn by (seed, query id): [queries, candidates].

    Args:
        config: The whole config.
        vectors: [documents, dim] of the corpus.
        fused: [queries, candidates, dim] a query's vector with each of its candidates.
        judged: The same queries' relevant documents.
    """
    result = np.zeros(fused.shape[:2])
    for row, query in enumerate(judged.queries):
        relevant = judged.documents[row][judged.documents[row] >= 0]
        sets = _draw_sets(config, query, relevant, len(vectors))
        grades = np.zeros(sets.shape)
        # The relevant documents stand last, so that a tie counts against them.
        grades[:, sets.shape[1] - len(relevant) :] = judged.grades[row, : len(relevant)]
        documents = np.asarray(vectors[sets.ravel()], np.float32).reshape(*sets.shape, -1)
        result[row] = rewards.group_ndcg(fused[row], documents, grades)
    return result


def _draw_sets(config: Any, query: str, relevant: np.ndarray, total: int) -> np.ndarray:
    """[sets, documents] rows of the corpus: other documents than the relevant ones, then these."""
    digest = hashlib.sha256(query.encode()).digest()
    generator = np.random.default_rng([config.seed, int.from_bytes(digest[:8], "big")])
    size = min(config.reward.group_size, total - len(relevant))
    sets = []
    for _ in range(config.reward.group_sets):
        drawn = generator.choice(total, size + len(relevant), replace=False)
        others = drawn[~np.isin(drawn, relevant)][:size]
        sets.append(np.concatenate([others, relevant]))
    return np.stack(sets)
