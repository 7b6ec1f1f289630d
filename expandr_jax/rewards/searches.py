"""How rewards search the corpus for expanded queries, by the names of `reward.search`.

Each takes evidence, and whether a query is searched for alone before it is with its candidates.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from expandr_jax.ranking.stages import reciprocal_rank_fusion
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.search import BlockSearch, measure_searches, vector_search


def dense_search(evidence: Evidence, plain: bool) -> BlockSearch:
    """Searches for vectors, those of expanded queries with `reward.query_weight`."""
    vectors, queries = evidence.fused, evidence.queries
    if plain:
        absent = np.zeros((len(queries), 1), bool)
        alone = evidence.fuse(queries, np.zeros_like(queries)[:, None], absent, query_weight=1.0)
        vectors = np.concatenate([alone, vectors], axis=1)
    context = evidence.context
    return vector_search(context.corpus.index, vectors, evidence.depth)


def bm25_search(evidence: Evidence, plain: bool) -> BlockSearch:
    """Searches for words, those of expanded queries as the strategy writes them for BM25."""
    sparse, index = evidence.context.strategy.sparse, evidence.context.words()

    def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
        queries = []
        for group in evidence.groups[part]:
            expanded = (sparse(group.query, [text] if text else []) for text in group.texts)
            queries += [*([group.query] if plain else []), *expanded]
        scores, found = index.search(queries, evidence.depth)
        return scores, np.where(scores > 0, found, -1)  # The others share no word with the query.

    return search


def fused_search(evidence: Evidence, plain: bool) -> BlockSearch:
    """Reciprocal rank fusion of both."""
    searches = dense_search(evidence, plain), bm25_search(evidence, plain)

    def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
        columns = [search(part)[1] for search in searches]
        found = np.full(columns[0].shape, -1)
        scores = np.zeros(found.shape)
        for row, rankings in enumerate(zip(*columns, strict=True)):
            fused = reciprocal_rank_fusion([ranking[ranking >= 0].tolist() for ranking in rankings])
            best = sorted(fused.items(), key=lambda item: -item[1])[: found.shape[1]]
            found[row, : len(best)], scores[row, : len(best)] = zip(*best, strict=True)
        return scores, found

    return search


@dataclasses.dataclass(frozen=True)
class RewardSearch:
    """A way to search the corpus.

    Attributes:
        of: (evidence, whether each query is searched for alone, too) to the search.
        vectors: It searches for vectors.
        words: It searches for words.
    """

    of: Callable[[Evidence, bool], BlockSearch]
    vectors: bool = False
    words: bool = False


REWARD_SEARCHES = {
    "dense": RewardSearch(dense_search, vectors=True),
    "bm25": RewardSearch(bm25_search, words=True),
    "fused": RewardSearch(fused_search, vectors=True, words=True),
}


def corpus_reward(evidence: Evidence) -> np.ndarray:
    """`reward.corpus_measure` of each expanded query's search: [queries, candidates] float64."""
    return _worth(evidence, evidence.context.settings.corpus_measure, plain=False)


def gain_reward(evidence: Evidence) -> np.ndarray:
    """`reward.gain_measure` of each expanded query's search, less that of the query's own search.

    [queries, candidates] float64, below 0 where the plain query does better.
    """
    worth = _worth(evidence, evidence.context.settings.gain_measure, plain=True)
    return worth[:, 1:] - worth[:, :1]


def _worth(evidence: Evidence, measure: str, plain: bool) -> np.ndarray:
    """[queries, searches of a query] what they are worth."""
    settings = evidence.context.settings
    return measure_searches(
        REWARD_SEARCHES[settings.search].of(evidence, plain),
        evidence.judged,
        plain + evidence.each,
        measure,
        settings.corpus_temperature,
        evidence.context.answers,
        settings.depth,
    )
