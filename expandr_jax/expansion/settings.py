"""The settings of expansions; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.expansion.combine import DEV, WAYS
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.generation.settings import SamplingSettings
from expandr_jax.settings import MANY, NotNegative, choice, count
from expandr_jax.vectors.encoder import Kind


@dataclasses.dataclass(frozen=True)
class ExpansionSettings(SamplingSettings):
    """The section `expansion`."""

    strategy: Annotated[str, choice(STRATEGIES)]
    template: str
    temperature: NotNegative
    combine: Annotated[str, choice((*WAYS, DEV))]
    train_samples: Annotated[int, count(0, MANY)]
    strip_train_lead_ins: bool

    @property
    def kind(self) -> Kind:
        """How a run encodes the strategy's texts."""
        return STRATEGIES[self.strategy].in_a_run.kind
