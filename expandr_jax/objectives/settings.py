"""The settings of what is learned in steps A and B; configs/base.py says what each means."""

import dataclasses
from typing import Annotated, get_args

from expandr_jax.models.stack import REMATS
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.settings import (
    ComputeType,
    NotNegative,
    Positive,
    Share,
    choice,
    count,
    number,
    several,
)
from expandr_jax.training.settings import TrainingSettings
from expandr_jax.vectors.query import Normalize


@dataclasses.dataclass(frozen=True)
class ContrastiveSettings(TrainingSettings):
    """The section `contrastive`, of step A."""

    compute_dtype: ComputeType
    length_window: Annotated[int, count(0)]
    weight_decay: NotNegative
    temperature: Positive
    query_weight: Share
    normalize: Annotated[str, choice(get_args(Normalize))]
    negatives: Annotated[int, count(0)]
    plain_share: Share
    dropout: bool
    remat: Annotated[str, choice(REMATS)]
    micro_batch: Annotated[int, count(0)]
    learn_temperature: bool
    symmetric: bool
    info_nce_weight: NotNegative
    margin_mse_weight: NotNegative
    kl_weight: NotNegative
    teacher_temperature: Positive
    invariance_weight: NotNegative
    dimensions: Annotated[tuple[int, ...], several(count(1), least=0)]
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
