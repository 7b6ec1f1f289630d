"""Rewards of candidate passages and the preference pairs made from them (ExpandR, section on DPO).

All functions are pure and work on whole batches of numpy arrays. Ranks start at 1.
"""

import dataclasses

import numpy as np


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each score among its row's: 1 is the highest, ties go to the lower index.

    Args:
        scores: [..., candidates].

    Returns:
        [..., candidates] int64.

    Raises:
        ValueError: If a score is not finite.
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


def rank_in_results(results: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Where a search found the right document.

    Args:
        results: [queries, depth] document indices, best first.
        positive: [queries] index of the right document.

    Returns:
        [queries] int64 ranks, 0 where it is not among the results.
    """
    hit = np.asarray(results) == np.asarray(positive)[:, None]
    return np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)


def ranks_in_results(results: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """Where a search found each of several documents.

    Args:
        results: [queries, depth] document indices, best first.
        documents: [queries, count] indices; one that is no index, such as -1, is not found.

    Returns:
        [queries, count] int64 ranks, 0 for a document that is not among the results.
    """
    # A column at a time: all at once would take count times the memory of the results.
    return np.stack([rank_in_results(results, column) for column in np.asarray(documents).T], 1)


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
    """Share of the right documents in softmax(score / temperature) over the results of a search.

    With one right document its logarithm is minus a contrastive loss over the results. It changes
    with every score, where a rank stays the same until two documents change places; so scores must
    be on one scale, as those of vectors of unit length are.

    Args:
        scores: [queries, results] of the documents found.
        results: [queries, results] their ids; -1 for filling.
        documents: [queries, count] ids of the right ones, each once; -1 for filling.
        temperature: Divides the scores; above 0.

    Returns:
        [queries] float64 between 0 and 1; 0 where no right document was found.

    References:
        The retrieval likelihood of REPLUG, arXiv 2301.12652, over what was found.
    """
    logits = np.where(results >= 0, np.asarray(scores, np.float64) / temperature, -np.inf)
    best = logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(best == -np.inf, 0.0, best))
    right = np.zeros(results.shape, bool)
    for column in np.asarray(documents).T:  # All at once would take count times the memory.
        right |= (results == column[:, None]) & (column >= 0)[:, None]
    total = np.sum(weights, axis=-1)
    share = np.sum(np.where(right, weights, 0.0), axis=-1)
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


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """Weights of the reward's terms; the paper has 1, 1 and no others.

    Attributes:
        positive: On 1 / rank among the candidates by similarity to the right document.
        answer: On the same by similarity to the self-answer.
        corpus: On 1 / rank of the right document in the corpus for the expanded query, or another
            measure of that search.
        group: On nDCG of the expanded query's ranking of a sampled set of documents.
    """

    positive: float = 1.0
    answer: float = 1.0
    corpus: float = 0.0
    group: float = 0.0


def total_reward(terms: dict[str, np.ndarray], weights: RewardWeights) -> np.ndarray:
    """Weighted sum of reward terms named like the weights; terms of one shape."""
    return sum(getattr(weights, name) * np.asarray(value) for name, value in terms.items())


def passes_similarity_filter(
    similarity_positive: np.ndarray, similarity_answer: np.ndarray, threshold: float
) -> np.ndarray:
    """Keeps a query whose best candidate is near enough to the right document and the answer.

    Args:
        similarity_positive: [queries, candidates] cosine to the right document.
        similarity_answer: [queries, candidates] cosine to the self-answer.
        threshold: Least value of the highest sum; the paper's is 0.6.

    Returns:
        [queries] bool.
    """
    total = np.asarray(similarity_positive, np.float64) + np.asarray(similarity_answer, np.float64)
    return total.max(axis=-1) >= threshold


def candidate_shares(
    rewards: np.ndarray, usable: np.ndarray, temperature: float, least: float = 1e-3
) -> np.ndarray:
    """Share of each candidate in what is learned of its query: softmax(reward / temperature).

    w_i = exp(r_i / T) / sum_j exp(r_j / T) over the query's usable candidates. As T falls to 0 the
    best candidate alone is learned, with equal shares of those that tie; as it rises, all alike.

    Args:
        rewards: [..., candidates].
        usable: [..., candidates] bool, False for a candidate that must not be learned.
        temperature: T, above 0, in units of the reward.
        least: A share below so much of the best one's is not worth its computation: it becomes 0.

    Returns:
        [..., candidates] float64, each query's summing to 1; all 0 where none is usable.

    References:
        Reward-weighted regression: Peters and Schaal, ICML 2007; with exponential weights Peng et
        al., arXiv 1910.00177. EXSEARCH's M step, too, weighs what it learns by its reward.
    """
    rewards = np.where(usable, np.asarray(rewards, np.float64), -np.inf)
    best = rewards.max(axis=-1, keepdims=True)
    weights = np.exp((rewards - np.where(np.isfinite(best), best, 0.0)) / temperature)
    weights[weights < least] = 0.0
    total = weights.sum(axis=-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)


def select_pair(rewards: np.ndarray, texts: list[str]) -> tuple[int, int] | None:
    """Indices of the chosen (highest reward) and rejected (lowest) candidate; lower index on ties.

    Args:
        rewards: [candidates].
        texts: The candidates' texts.

    Returns:
        (chosen, rejected), or None where both have the same text, so that nothing is preferred.
    """
    chosen, rejected = int(np.argmax(rewards)), int(np.argmin(rewards))
    if texts[chosen].strip() == texts[rejected].strip():
        return None
    return chosen, rejected
