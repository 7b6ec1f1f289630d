"""What a candidate is worth as the expansion of its query's search: in the corpus, in a sample."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.rewards import ranks as rewards
from expandr_jax.search import Index

MEASURES = ("reciprocal_rank", "ndcg", "average_precision", "softmax_share")
BLOCK_ROWS = 8192  # Expanded queries whose results are in memory at once.


@dataclasses.dataclass(frozen=True)
class Judged:
    """The right documents of some queries.

    Attributes:
        queries: Ids of the queries.
        documents: [queries, count] rows of the index, the first one's grade the highest; -1 fills.
        grades: [queries, count] relevance; 0 fills.
    """

    queries: Sequence[str]
    documents: np.ndarray
    grades: np.ndarray


def judged_documents(
    data: TrainingData, queries: Sequence[str], place: Mapping[str, int], *, split: str = "train"
) -> Judged:
    """The right documents of a split's queries.

    Args:
        data: Has the judgements.
        queries: Ids.
        place: Document id to its row in the index.
        split: Whose judgements.
    """
    positives = [data.positives(query, split) for query in queries]
    shape = len(queries), max(map(len, positives), default=1)
    documents, grades = np.full(shape, -1), np.zeros(shape)
    for row, (query, ids) in enumerate(zip(queries, positives, strict=True)):
        judged = data.collection.qrels[split][query]
        documents[row, : len(ids)] = [place[document] for document in ids]
        grades[row, : len(ids)] = [judged[document] for document in ids]
    return Judged(queries, documents, grades)


def corpus_reward(
    config: ml_collections.ConfigDict, index: Index, fused: np.ndarray, judged: Judged
) -> np.ndarray:
    """`reward.corpus_measure` of each expanded query's search: [queries, candidates] float64.

    Args:
        config: The whole config.
        index: Of the corpus.
        fused: [queries, candidates, dim] a query's vector with each of its candidates.
        judged: Of the same queries.
    """
    result = np.zeros(fused.shape[:2])
    rows = max(1, BLOCK_ROWS // max(1, fused.shape[1]))
    for start in range(0, len(fused), rows):
        block = slice(start, start + rows)
        result[block] = _measure(
            config.reward, index, fused[block], judged.documents[block], judged.grades[block]
        )
    return result


def _measure(
    reward: ml_collections.ConfigDict,
    index: Index,
    fused: np.ndarray,
    right: np.ndarray,
    grades: np.ndarray,
) -> np.ndarray:
    """`corpus_reward` of some queries, given the rows of `Judged` that are theirs."""
    queries, count, width = fused.shape
    scores, found = index.search(fused.reshape(-1, width), reward.depth)
    if reward.corpus_measure == "softmax_share":
        documents = np.repeat(right, count, axis=0)
        share = rewards.softmax_share(scores, found, documents, reward.corpus_temperature)
        return share.reshape(queries, count)
    wanted = 1 if reward.corpus_measure == "reciprocal_rank" else right.shape[1]
    documents = np.repeat(right[:, :wanted], count, axis=0)
    rank = rewards.ranks_in_results(found, documents).reshape(queries, count, wanted)
    grades = np.broadcast_to(grades[:, None, :wanted], rank.shape)
    if reward.corpus_measure == "reciprocal_rank":
        return rewards.reciprocal_rank(rank[..., 0])
    if reward.corpus_measure == "ndcg":
        return rewards.ndcg(rank, grades)
    return rewards.average_precision(rank, grades > 0)


def group_reward(
    config: ml_collections.ConfigDict, vectors: np.ndarray, fused: np.ndarray, judged: Judged
) -> np.ndarray:
    """`rewards.group_ndcg` over sets drawn by (seed, query id): [queries, candidates].

    Args:
        config: The whole config.
        vectors: [documents, dim] of the corpus.
        fused: [queries, candidates, dim] a query's vector with each of its candidates.
        judged: Of the same queries.
    """
    result = np.zeros(fused.shape[:2])
    for row, query in enumerate(judged.queries):
        right = judged.documents[row][judged.documents[row] >= 0]
        sets = _draw_sets(config, query, right, len(vectors))
        grades = np.zeros(sets.shape)
        # The right documents stand last, so that a tie counts against them.
        grades[:, sets.shape[1] - len(right) :] = judged.grades[row, : len(right)]
        documents = np.asarray(vectors[sets.ravel()], np.float32).reshape(*sets.shape, -1)
        result[row] = rewards.group_ndcg(fused[row], documents, grades)
    return result


def _draw_sets(
    config: ml_collections.ConfigDict, query: str, right: np.ndarray, total: int
) -> np.ndarray:
    """[sets, documents] rows of the corpus: other documents than the right ones, then these."""
    digest = hashlib.sha256(query.encode()).digest()
    generator = np.random.default_rng([config.seed, int.from_bytes(digest[:8], "big")])
    size = min(config.reward.group_size, total - len(right))
    sets = []
    for _ in range(config.reward.group_sets):
        drawn = generator.choice(total, size + len(right), replace=False)
        others = drawn[~np.isin(drawn, right)][:size]
        sets.append(np.concatenate([others, right]))
    return np.stack(sets)
