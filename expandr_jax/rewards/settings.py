"""The settings of candidates and of self-answers; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.generation.settings import SamplingSettings
from expandr_jax.settings import MANY, NOT_NEGATIVE, NotNegative, count, several


@dataclasses.dataclass(frozen=True)
class CandidatesSettings(SamplingSettings):
    """The section `candidates`."""

    temperatures: Annotated[tuple[float, ...], several(NOT_NEGATIVE)]
    per_temperature: Annotated[int, count(1, MANY)]

    @property
    def all_temperatures(self) -> list[float]:
        """The temperature of each of a query's candidates."""
        return [t for t in self.temperatures for _ in range(self.per_temperature)]


@dataclasses.dataclass(frozen=True)
class AnswerSettings(SamplingSettings):
    """The section `answer`."""

    temperature: NotNegative
    max_characters: Annotated[int, count(1)]
