"""Ranks, and measures of rankings.

All functions are pure and work on whole batches of numpy arrays. Ranks start at 1.
"""

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each score among its row's, [..., candidates] int64.

    1 is the highest, and ties go to the lower index. Raises ValueError if a score is not finite.
    """
    scores = np.asarray(scores)
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite to be ranked")
    order = np.argsort(-scores, axis=-1, kind="stable")
    result = np.empty(scores.shape, np.int64)
    np.put_along_axis(result, order, np.arange(1, scores.shape[-1] + 1), axis=-1)
    return result


def reciprocal_rank(rank: np.ndarray) -> np.ndarray:
    """1 / rank, and 0 where the rank is 0 (not found within the depth searched)."""
    rank = np.asarray(rank, np.float64)
    return np.divide(1.0, rank, out=np.zeros_like(rank), where=rank > 0)


def piecewise_rank(rank: np.ndarray) -> np.ndarray:
    """2 falling to 1 over ranks 1 to 10, then to 0 at rank 100; 0 beyond and where the rank is 0.

    2 - (rank - 1) / 9 up to rank 10, 1 - (rank - 10) / 90 from there to 100: the reward of
    ConvSearch-R1, arXiv 2505.15776, which tells ranks apart where their inverses hardly do.
    """
    rank = np.asarray(rank)
    return np.where(rank > 0, np.interp(rank, [1, 10, 100], [2.0, 1.0, 0.0]), 0.0)


def best_rank(rank: np.ndarray) -> np.ndarray:
    """The first of [..., count] ranks of several documents; 0 where none was found."""
    first = np.min(np.where(rank > 0, rank, np.inf), axis=-1)
    return np.where(np.isfinite(first), first, 0).astype(np.int64)


def ranks_in_results(results: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where a search found each of several documents.

    Args:
        results: [queries, depth] document indices, best first.
        documents: [queries, count] indices; one that is no index, such as -1, is not found.

    Returns:
        [queries, count] int64 ranks, 0 for a document that is not among the results.
    """
    found = []
    # A column at a time: all at once would take count times the memory of the results.
    for column in np.asarray(documents).T:
        # What fills documents up must not be found in what fills results up.
        hit = (np.asarray(results) == column[:, None]) & (column >= 0)[:, None]
        found.append(np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0))
    return np.stack(found, axis=1)


def ndcg(rank: np.ndarray, grades: np.ndarray, cutoff: int | None = None) -> np.ndarray:
    """Normalised discounted cumulative gain of a ranking, from the ranks of what is relevant.

    sum_i g_i / log2(1 + rank_i) over the documents ranked within the cut-off, divided by the same
    of the best possible ranking; trec_eval's, with linear gains.

    Args:
        rank: [..., count] ranks of the relevant documents, 0 for one that was not found; found
            ones differ.
        grades: [..., count] their relevance, 0 or more; 0 for filling.
        cutoff: Lowest rank that counts; None for any.

    Returns:
        [...] values between 0 and 1; 0 where nothing is relevant.

    References:
        Järvelin and Kekäläinen, ACM TOIS 20 (2002).
    """
    rank, grades = np.broadcast_arrays(rank, np.asarray(grades, np.float64))
    best = np.broadcast_to(np.arange(1, grades.shape[-1] + 1), grades.shape)

    def gain(rank: np.ndarray, grades: np.ndarray) -> np.ndarray:
        counted = (rank > 0) & ((rank <= cutoff) if cutoff is not None else True)
        discounts = np.log2(1.0 + np.maximum(rank, 1))
        return np.sum(np.where(counted, grades / discounts, 0.0), axis=-1)

    ideal = gain(best, -np.sort(-grades, axis=-1))
    return np.divide(gain(rank, grades), ideal, out=np.zeros_like(ideal), where=ideal > 0)


def average_precision(rank: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Mean over the relevant documents of the precision at their rank, 0 for one not found.

    Args:
        rank: [..., count] ranks, 0 for a document that was not found; found ones differ.
        relevant: [..., count] bool, False for filling.

    Returns:
        [...] values between 0 and 1; 0 where nothing is relevant.

    References:
        LeReT's reward, arXiv 2410.23214; trec_eval's "map" of one query.
    """
    rank, relevant = np.broadcast_arrays(rank, np.asarray(relevant, bool))
    found = relevant & (rank > 0)
    ordered = np.sort(np.where(found, rank, np.inf), axis=-1)
    precision = np.sum(np.arange(1, ordered.shape[-1] + 1) / ordered, axis=-1)
    count = relevant.sum(axis=-1)
    return np.divide(precision, count, out=np.zeros_like(precision), where=count > 0)


def softmax_share(
    scores: np.ndarray, results: np.ndarray, documents: np.ndarray, temperature: float
) -> np.ndarray:
    """Share of the relevant documents in softmax(score / temperature) over the results of a search.

    With one relevant document its logarithm is minus a contrastive loss over the results. It
    changes with every score, where a rank stays the same until two documents change places; so
    scores must be on one scale, as those of vectors of unit length are.

    Args:
        scores: [queries, results] of the documents found.
        results: [queries, results] their ids; -1 for filling.
        documents: [queries, count] ids of the relevant ones, each once; -1 for filling.
        temperature: Divides the scores; above 0.

    Returns:
        [queries] float64 between 0 and 1; 0 where no relevant document was found.

    References:
        The retrieval likelihood of REPLUG, arXiv 2301.12652, over what was found.
    """
    logits = np.where(results >= 0, np.asarray(scores, np.float64) / temperature, -np.inf)
    best = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(best == -np.inf, 0.0, best))
    relevant = np.zeros(results.shape, bool)
    for column in np.asarray(documents).T:  # All at once would take count times the memory.
        relevant |= (results == column[:, None]) & (column >= 0)[:, None]
    total = np.sum(weights, axis=-1)
    share = np.sum(np.where(relevant, weights, 0.0), axis=-1)
    return np.divide(share, total, out=np.zeros_like(total), where=total != 0)


def group_ndcg(
    queries: np.ndarray, documents: np.ndarray, grades: np.ndarray, cutoff: int = 10
) -> np.ndarray:
    """nDCG of each expanded query's ranking of sampled documents, mean over the sets sampled.

    Args:
        queries: [..., candidates, dim] a query's vector with each of its candidates.
        documents: [..., sets, documents, dim] of each set; ties go to the one that stands first.
        grades: [..., sets, documents] relevance, 0 or more.
        cutoff: Lowest rank that counts.

    Returns:
        [..., candidates] float64.

    References:
        The reward of query-document co-augmentation: nDCG@10 over a sampled set of candidates,
        averaged over pairings; here a pairing is a query's expansion with a set.
    """
    scores = np.einsum("...cd,...sgd->...csg", queries, documents)
    return ndcg(ranks(scores), np.asarray(grades)[..., None, :, :], cutoff).mean(axis=-1)
