"""The settings of what is learned in steps A and B; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.models.stack import REMATS
from expandr_jax.objectives.contrastive import ContrastiveConfig
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.settings import ComputeType, NotNegative, Share, choice, count, number
from expandr_jax.training.settings import TrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveSettings(ContrastiveConfig, TrainingSettings):
    """The section `contrastive`, of step A."""

    compute_dtype: ComputeType
    length_window: Annotated[int, count(0)]
    weight_decay: NotNegative
    negatives: Annotated[int, count(0)]
    plain_share: Share
    dropout: bool
    remat: Annotated[str, choice(REMATS)]
    patience: Annotated[int, count(0)]
    restart: bool


@dataclasses.dataclass(frozen=True)
class MiningSettings:
    """The section `mining`, of step A's hard negatives."""

    per_query: Annotated[int, count(0)]
    first: Annotated[int, count(0)]
    depth: Annotated[int, count(1)]
    absolute_margin: float | None
    relative_margin: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DpoSettings(ObjectiveSettings, TrainingSettings):
    """The section `dpo`, of step B."""

    loss: Annotated[str, choice(OBJECTIVES)]
    prompt_length: Annotated[int, count(1)]
    response_length: Annotated[int, count(2)]  # A token and the end.
    on_bad_pair: Annotated[str, choice(("error", "drop"))]
    dev_share: Annotated[float, number(least=0, below=1)]
    keep_best: bool
