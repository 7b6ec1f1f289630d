"""The settings of candidates and of their rewards; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.generation.settings import SamplingSettings
from expandr_jax.rewards.search import MEASURES
from expandr_jax.settings import (
    MANY,
    NOT_NEGATIVE,
    NotNegative,
    Positive,
    Share,
    choice,
    count,
    several,
)


@dataclasses.dataclass(frozen=True)
class CandidatesSettings(SamplingSettings):
    """The section `candidates`."""

    temperatures: Annotated[tuple[float, ...], several(NOT_NEGATIVE)]
    per_temperature: Annotated[int, count(1, MANY)]


@dataclasses.dataclass(frozen=True)
class AnswerSettings(SamplingSettings):
    """The section `answer`."""

    temperature: NotNegative
    max_characters: Annotated[int, count(1)]


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """The section `reward`."""

    positive: NotNegative
    answer: NotNegative
    corpus: NotNegative
    corpus_measure: Annotated[str, choice(MEASURES)]
    corpus_temperature: Positive
    group: NotNegative
    group_size: Annotated[int, count(1)]
    group_sets: Annotated[int, count(1, MANY)]
    query_weight: Share
    depth: Annotated[int, count(1)]
    threshold: float
