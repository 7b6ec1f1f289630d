"""The settings of the generator and of sampling; configs/base.py says what each means."""

import dataclasses
import datetime
import operator
from typing import Annotated, Any

from expandr_jax.models.stack import REMATS
from expandr_jax.settings import (
    TEXT,
    WEIGHTS,
    Check,
    ComputeType,
    NotNegative,
    Positive,
    Sha256,
    Share,
    choice,
    count,
    number,
    several,
)


def _is_day(value: Any) -> bool:
    try:
        return value == "" or datetime.date.fromisoformat(value).isoformat() == value
    except (TypeError, ValueError):
        return False


DAY = Check('a day as "2026-11-28", or ""', _is_day)
ASCENDING = Check(
    "a tuple of whole numbers above 0 that ascend",
    lambda value: several(count(1)).holds(value) and all(map(operator.lt, value, value[1:])),
)


@dataclasses.dataclass(frozen=True)
class ServerSettings:
    """The section `generator.server`; a server sends no byte before a text is complete."""

    url: str
    model: str
    concurrency: Annotated[int, count(1)]
    retries: Annotated[int, count(0)]
    timeout: Positive


@dataclasses.dataclass(frozen=True)
class GeneratorSettings:
    """The section `generator`."""

    source: str
    shape: str
    sha256: Sha256 | None
    compute_dtype: ComputeType
    weights: Annotated[str, choice(WEIGHTS, empty=True)]
    remat: Annotated[str, choice(REMATS)]
    thinking: bool | None
    today: Annotated[str, DAY]
    stop: Annotated[tuple[str, ...], several(TEXT, least=0)]
    slots: Annotated[int, count(1)]
    memory_limit: NotNegative
    prompt_buckets: Annotated[tuple[int, ...], ASCENDING]
    server: ServerSettings

    @property
    def chat(self) -> dict[str, Any]:
        """The fields of a `Generator` that say what chat templates are told."""
        today = datetime.date.fromisoformat(self.today) if self.today else datetime.date.today()
        return {"thinking": self.thinking, "today": today}


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of a text are drawn: what all sections that sample texts have."""

    top_p: Annotated[float, number(above=0, most=1)]
    top_k: Annotated[int, count(0)]
    min_p: Share
    # Beyond these bounds, logits are all or nothing.
    repetition_penalty: Annotated[float, number(least=0.1, most=10)]
    max_new_tokens: Annotated[int, count(1)]
