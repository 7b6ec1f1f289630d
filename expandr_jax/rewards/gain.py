"""What a candidate adds to its query's search: below 0 where the plain query does better.

Each query is searched for alone, then with each of its candidates.
"""

import numpy as np

from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.ranking.stages import reciprocal_rank_fusion
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.search import Search, measure_searches


def dense_search(evidence: Evidence) -> Search:
    """Searches for vectors, those of expanded queries with `reward.query_weight`."""
    queries = evidence.queries
    absent = np.zeros((len(queries), 1), bool)
    alone = evidence.fuse(queries, np.zeros_like(queries)[:, None], absent, query_weight=1.0)
    index, depth = evidence.context.corpus.index, evidence.context.config.reward.depth

    def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.concatenate([alone[part], evidence.fused[part]], axis=1)
        return index.search(vectors.reshape(-1, vectors.shape[-1]), depth)

    return search


def bm25_search(evidence: Evidence) -> Search:
    """Searches for words, those of expanded queries as the strategy writes them for BM25."""
    config, index = evidence.context.config, evidence.context.words
    sparse = STRATEGIES[config.expansion.strategy].sparse

    def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
        queries = []
        for group in evidence.groups[part]:
            expanded = (sparse(group.query, [text] if text else []) for text in group.texts)
            queries += [group.query, *expanded]
        scores, found = index.search(queries, config.reward.depth)
        return scores, np.where(scores > 0, found, -1)  # The others share no word with the query.

    return search


def fused_search(evidence: Evidence) -> Search:
    """Reciprocal rank fusion of both."""
    searches = dense_search(evidence), bm25_search(evidence)

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


GAIN_SEARCHES = {"dense": dense_search, "bm25": bm25_search, "fused": fused_search}


def gain_reward(evidence: Evidence) -> np.ndarray:
    """`reward.gain_measure` of each expanded query's search, less that of the query's own search.

    [queries, candidates] float64, between -1 and 1.
    """
    settings = evidence.context.config.reward
    worth = measure_searches(
        GAIN_SEARCHES[settings.gain_search](evidence),
        evidence.judged,
        1 + evidence.candidates.shape[1],
        settings.gain_measure,
        settings.corpus_temperature,
    )
    return worth[:, 1:] - worth[:, :1]
