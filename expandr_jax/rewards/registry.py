"""Rewards by the names that `config.reward` weighs, and groups that are given them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.form import format_reward, length_reward
from expandr_jax.rewards.functions import FUNCTION_PREFIX, FUNCTIONS
from expandr_jax.rewards.group import COMPARED_WITH, Group
from expandr_jax.rewards.ranks import reciprocal_rank
from expandr_jax.rewards.search import SEARCH_MEASURES, group_reward
from expandr_jax.rewards.searches import REWARD_SEARCHES, corpus_reward, gain_reward
from expandr_jax.settings import (
    MANY,
    PATTERN,
    POSITIVE,
    Complaints,
    NotNegative,
    Positive,
    Share,
    at_least_one,
    choice,
    count,
    several,
)


@dataclasses.dataclass(frozen=True)
class Reward:
    """A reward, and what has to be there for it beside the candidates' texts.

    Attributes:
        of: Evidence to [queries, candidates].
        vectors: It looks at vectors: of candidates, of queries or of the corpus.
        searches: It searches the corpus as `reward.search` says, which may want vectors, too; and
            what a search is worth is a measure that `reward.NAME_measure` names.
        answers: It looks at self-answers, which only queries that train have.
        lengths: It looks at how many tokens were sampled, and what ended them.
    """

    of: Callable[[Evidence], np.ndarray]
    vectors: bool = False
    searches: bool = False
    answers: bool = False
    lengths: bool = False


def _group_reward(evidence: Evidence) -> np.ndarray:
    context = evidence.context
    return group_reward(
        context.corpus.vectors,
        evidence.fused,
        evidence.judged,
        sets=context.settings.group_sets,
        size=context.settings.group_size,
        seed=context.seed,
    )


REWARDS = {
    "positive": Reward(lambda evidence: reciprocal_rank(evidence.ranks["positive"]), vectors=True),
    "answer": Reward(
        lambda evidence: reciprocal_rank(evidence.ranks["answer"]), vectors=True, answers=True
    ),
    "corpus": Reward(corpus_reward, searches=True),
    "group": Reward(_group_reward, vectors=True),
    "gain": Reward(gain_reward, searches=True),
    "length": Reward(length_reward, lengths=True),
    "format": Reward(format_reward),
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
    search: Annotated[str, choice(REWARD_SEARCHES)]
    length: NotNegative
    length_cache: Annotated[int, count(1)]
    format: NotNegative
    format_pattern: Annotated[str, PATTERN]
    functions: Annotated[tuple[str, ...], FUNCTIONS]
    function_weights: Annotated[tuple[float, ...], several(POSITIVE, least=0)]
    function_seconds: Positive
    query_weight: Share
    depth: Annotated[int, count(1)]
    threshold: float

    def refused(self) -> Complaints:
        """Rewards that all weigh nothing, and weights that are not one for each function."""
        yield from at_least_one("reward", self, (*REWARDS, "functions"))
        if self.function_weights and len(self.function_weights) != len(self.functions):
            one_each = f"() or a weight for each of reward.functions, {len(self.functions)}"
            yield "function_weights", one_each

    @property
    def measures(self) -> dict[str, str]:
        """Name of a reward that searches and has a weight -> the measure of its searches."""
        return {
            name: getattr(self, f"{name}_measure")
            for name, reward in REWARDS.items()
            if reward.searches and getattr(self, name) > 0
        }


def reward_weights(settings: RewardSettings) -> dict[str, float]:
    """The weight of each reward by its name, "function:my.module:name" of those of the user's own.

    All are there, those that weigh nothing as 0.
    """
    own = [f"{FUNCTION_PREFIX}{name}" for name in settings.functions]
    weights = settings.function_weights or (1.0,) * len(own)
    return {
        **{name: getattr(settings, name) for name in REWARDS},
        **dict(zip(own, weights, strict=True)),
    }


def total_reward(terms: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum of rewards, by the weights that have their names."""
    return sum(weights[name] * np.asarray(value) for name, value in terms.items())


def needs(settings: RewardSettings, what: str) -> bool:
    """Whether a reward with a weight needs something: a field of `Reward`, as "lengths"."""
    return any(
        getattr(reward, what) and getattr(settings, name) > 0 for name, reward in REWARDS.items()
    )


def needs_vectors(settings: RewardSettings) -> bool:
    """Whether a reward with a weight looks at vectors: of candidates, of queries, of the corpus."""
    by_vectors = REWARD_SEARCHES[settings.search].vectors
    return needs(settings, "vectors") or (by_vectors and needs(settings, "searches"))


def check_answers(settings: RewardSettings, data: TrainingData) -> None:
    """Refuses to look for answers where no query that the generator is trained on has any."""
    for name, measure in settings.measures.items():
        asked = SEARCH_MEASURES[measure].answers
        if asked and not any(query in data.collection.answers for query in data.generator_train):
            raise UserError(
                f"reward.{name}_measure is {measure!r}, and no query that trains the generator has "
                'answers; expected "answers", a list of strings, in lines of queries.jsonl, or '
                "another measure"
            )


def reward_groups(evidence: Evidence, what: str = "rewards") -> list[Group]:
    """The groups, with all that candidates.jsonl says of their candidates.

    Rewards by both ranks, the paper's, are always there; others where they have a weight.

    Raises:
        NotFiniteError: A reward is not finite, naming its query after `what`.
    """
    return _rewarded(evidence, what, COMPARED_WITH)


def score_groups(evidence: Evidence, what: str = "rewards") -> list[Group]:
    """The groups with rewards that have a weight, and no others: what on-policy training wants.

    Evidence has answers where the rewards' `needs` are those, and vectors where `needs_vectors`;
    the groups have no self-answer otherwise. Similarities and ranks are there as far as vectors
    are.

    Raises:
        NotFiniteError: As `reward_groups`.
    """
    return _rewarded(evidence, what, ())


def _rewarded(evidence: Evidence, what: str, always: Sequence[str]) -> list[Group]:
    """The groups with the rewards that have a weight, or that are `always` there."""
    context = evidence.context
    weights = reward_weights(context.settings)
    own = {f"{FUNCTION_PREFIX}{function.name}": function for function in context.functions}
    rewards = REWARDS | {
        name: Reward(functools.partial(Evidence.given_by, function=function))
        for name, function in own.items()
    }
    terms = {
        name: rewards[name].of(evidence)
        for name, weight in weights.items()
        if name in always or weight > 0
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
