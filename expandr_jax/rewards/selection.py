"""What is learned of groups that have been rewarded: the filter, pairs, shares."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from expandr_jax.rewards.group import COMPARED_WITH, Group

# Why no pair is made of a group, in the order in which this is looked at.
REASONS = "below the similarity threshold", "with nothing preferred", "with an empty side"


def passes_similarity_filter(
    similarity_positive: np.ndarray, similarity_answer: np.ndarray, threshold: float
) -> np.ndarray:
    """Keeps a query whose best candidate is near enough to the relevant document and the answer.

    Args:
        similarity_positive: [queries, candidates] cosine to the relevant document.
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

    None where both have the same text, so that nothing is preferred.
    """
    chosen, rejected = int(np.argmax(rewards)), int(np.argmin(rewards))
    if texts[chosen].strip() == texts[rejected].strip():
        return None
    return chosen, rejected


def best_alone(group: Group) -> Group | None:
    """A rewarded group with its best candidates alone; None where none is worth more than 0.

    All that tie are there: of rewards of 0 and 1 those that hit. Empty texts are left out.
    """
    usable = [candidate for candidate in group.candidates if candidate.text.strip()]
    most = max((candidate.total for candidate in usable), default=0.0)
    if most <= 0:
        return None
    best = [candidate for candidate in usable if candidate.total == most]
    return dataclasses.replace(group, candidates=best)


def nothing_to_learn(group: Group, threshold: float) -> str | None:
    """The reason why a rewarded group is left out of training, or None."""
    if not _is_similar(group, threshold):
        return "below the similarity threshold"
    usable = [candidate for candidate in group.candidates if candidate.text.strip()]
    if not usable:
        return "empty"
    if len({c.text.strip() for c in usable}) == 1 or len({c.total for c in usable}) == 1:
        return "nothing preferred"
    return None


def _is_similar(group: Group, threshold: float) -> bool:
    """Whether it passes the filter, for which its similarities have to be known."""
    if not all(side in c.similarities for c in group.candidates for side in COMPARED_WITH):
        return True
    columns = (np.array([c.similarities[side] for c in group.candidates]) for side in COMPARED_WITH)
    return bool(passes_similarity_filter(*columns, threshold))


def select_pairs(
    groups: Sequence[Group], threshold: float
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Lines of preferences.jsonl, and how many groups were left out for what reason.

    Pairs are made of the rewarded groups that pass the filter.
    """
    pairs, dropped = [], collections.Counter()
    for group in groups:
        pair = select_pair(np.array([c.total for c in group.candidates]), group.texts)
        chosen, rejected = (group.candidates[i] for i in pair or (0, 0))
        failed = (
            not _is_similar(group, threshold),
            pair is None,
            not chosen.text or not rejected.text,
        )
        if any(failed):
            dropped[REASONS[failed.index(True)]] += 1
            continue
        pairs.append(
            {
                "prompt": group.prompt,
                "chosen": chosen.text,
                "rejected": rejected.text,
                "query_id": group.query_id,
                "reward_chosen": chosen.total,
                "reward_rejected": rejected.total,
            }
        )
    return pairs, dict(dropped)
