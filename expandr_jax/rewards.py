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


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """Weights of the reward's terms; the paper has 1, 1 and no corpus term.

    Attributes:
        positive: On 1 / rank among the candidates by similarity to the right document.
        answer: On the same by similarity to the self-answer.
        corpus: On 1 / rank of the right document in the corpus for the expanded query.
    """

    positive: float = 1.0
    answer: float = 1.0
    corpus: float = 0.0


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
