"""Rewards by the names that `config.reward` weighs, and groups that are given them."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np

from expandr_jax.errors import NotFiniteError
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.gain import GAIN_SEARCHES, gain_reward
from expandr_jax.rewards.group import SIDES, Group
from expandr_jax.rewards.ranks import reciprocal_rank
from expandr_jax.rewards.search import SEARCH_MEASURES, corpus_reward, group_reward
from expandr_jax.settings import MANY, NotNegative, Positive, Share, choice, count

Reward = Callable[[Evidence], np.ndarray]  # To [queries, candidates].

REWARDS: dict[str, Reward] = {
    "positive": lambda evidence: reciprocal_rank(evidence.ranks["positive"]),
    "answer": lambda evidence: reciprocal_rank(evidence.ranks["answer"]),
    "corpus": lambda evidence: corpus_reward(
        evidence.context.config, evidence.context.corpus.index, evidence.fused, evidence.judged
    ),
    "group": lambda evidence: group_reward(
        evidence.context.config, evidence.context.corpus.vectors, evidence.fused, evidence.judged
    ),
    "gain": gain_reward,
}


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The section `reward`: a weight for each of the rewards, and what they can be set to."""

    positive: NotNegative
    answer: NotNegative
    corpus: NotNegative
    corpus_measure: Annotated[str, choice(SEARCH_MEASURES)]
    corpus_temperature: Positive
    group: NotNegative
    group_size: Annotated[int, count(1)]
    group_sets: Annotated[int, count(1, MANY)]
    gain: NotNegative
    gain_measure: Annotated[str, choice(SEARCH_MEASURES)]
    gain_search: Annotated[str, choice(GAIN_SEARCHES)]
    query_weight: Share
    depth: Annotated[int, count(1)]
    threshold: float


def total_reward(terms: dict[str, np.ndarray], weights: Any) -> np.ndarray:
    """Weighted sum of rewards, by the weights that have their names."""
    return sum(getattr(weights, name) * np.asarray(value) for name, value in terms.items())


def reward_groups(evidence: Evidence, what: str = "rewards") -> list[Group]:
    """The groups, with all that candidates.jsonl says of their candidates.

    Rewards by both ranks, the paper's, are always there; others where they have a weight.

    Raises:
        NotFiniteError: A reward is not finite, naming its query after `what`.
    """
    weights = evidence.context.config.reward
    terms = {
        name: reward(evidence)
        for name, reward in REWARDS.items()
        if name in SIDES or getattr(weights, name) > 0
    }
    total = total_reward(terms, weights)
    finite = np.isfinite(total).all(axis=1)
    if not finite.all():
        bad = [
            g.query_id
            for g, is_finite in zip(evidence.groups, finite, strict=True)
            if not is_finite
        ]
        raise NotFiniteError(
            f"{what}: not finite for queries {', '.join(bad)}; the retriever's weights are damaged "
            "or training diverged"
        )

    def numbers(columns: dict[str, np.ndarray], q: int, c: int) -> dict[str, Any]:
        return {name: column[q, c].item() for name, column in columns.items()}

    return [
        dataclasses.replace(
            group,
            candidates=[
                dataclasses.replace(
                    candidate,
                    similarities=numbers(evidence.similarities, q, c),
                    ranks=numbers(evidence.ranks, q, c),
                    rewards=numbers(terms, q, c),
                    total=total[q, c].item(),
                )
                for c, candidate in enumerate(group.candidates)
            ],
        )
        for q, group in enumerate(evidence.groups)
    ]
