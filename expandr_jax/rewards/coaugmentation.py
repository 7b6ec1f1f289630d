"""Rewards of texts for queries and for documents together, by searches among documents of a step.

Several texts were sampled for each query and for each document. A draw takes one version of every
document; each of a query's texts is then worth the nDCG@10 of its ranking of them. What a text is
worth is the mean over the draws that it took part in: arXiv 2506.18670.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from expandr_jax.data.documents import ids_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.rewards.ranks import ndcg, ranks

CUTOFF = 10  # The lowest rank that counts in nDCG.
GRADE_WEIGHT = 10.0  # A pair of query and document counts 1 + so many times its grade.


def draw_documents(
    data: TrainingData, queries: Sequence[str], each: int, seed: int, step: int
) -> list[str]:
    """Ids of the documents of a step, `each` for each of its queries, no document twice.

    Up to half of a query's, rounded up, are relevant to it, up to a quarter judged irrelevant, and
    the others any of the corpus. Who these are depends on the seed, the step and its queries.
    """
    corpus = ids_of(data.collection.corpus)
    drawn: dict[str, None] = {}
    for query in queries:
        digest = hashlib.sha256(query.encode()).digest()
        rng = np.random.default_rng([seed, step, int.from_bytes(digest[:8], "big")])
        relevant = data.positives(query)
        grades = data.collection.qrels["train"][query]
        others = sorted(d for d, g in grades.items() if g <= 0 and d in data.collection.corpus)
        most = len(drawn) + each
        for ids, count in ((relevant, -(-each // 2)), (others, each // 4)):
            new = [d for d in (ids[i] for i in rng.permutation(len(ids))) if d not in drawn]
            drawn |= dict.fromkeys(new[:count])
        while len(drawn) < most:
            drawn.setdefault(corpus[int(rng.integers(len(corpus)))])
    return [*drawn]


def drawn_versions(documents: int, versions: int, draws: int, seed: int, step: int) -> np.ndarray:
    """[draws, documents] which version of each document a draw takes: each as often as the others.

    There are `draws` of them, or as many more as let each version be drawn equally often.
    """
    rng = np.random.default_rng([seed, step])
    rounds = -(-draws // versions)
    each = np.tile(np.arange(versions), (rounds, documents, 1))
    return rng.permuted(each, axis=2).transpose(0, 2, 1).reshape(-1, documents)


def coaugmentation_rewards(
    scores: np.ndarray, grades: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What each text for a query, and each for a document, is worth.

    Args:
        scores: [queries, texts of a query, documents, versions of a document] similarities.
        grades: [queries, documents] relevance, 0 or more.
        draws: [draws, documents] versions, each of which is drawn at least once.

    Returns:
        [queries, texts of a query]: the mean nDCG@10 over all draws. [documents, versions of a
        document]: the mean over the draws with that version of all queries' texts' nDCG@10, where
        a query counts 1 + 10 times the document's grade for it.
    """
    documents = np.arange(grades.shape[1])
    # A tie of scores goes to the document that stands first: relevant ones must not gain by that.
    order = np.argsort(grades.max(axis=0), kind="stable")
    worth = np.stack(
        [
            ndcg(ranks(scores[:, :, order, draw[order]]), grades[:, None, order], CUTOFF)
            for draw in draws
        ]
    )
    weights = 1 + GRADE_WEIGHT * np.asarray(grades, np.float64)
    by_document = np.einsum("rq,qd->rd", worth.mean(axis=2), weights / weights.sum(axis=0))
    of_versions = np.zeros((len(documents), scores.shape[3]))
    counts = np.zeros_like(of_versions)
    for draw, value in zip(draws, by_document, strict=True):
        of_versions[documents, draw] += value
        counts[documents, draw] += 1
    return worth.mean(axis=0), of_versions / counts
