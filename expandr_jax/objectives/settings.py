"""The settings of what steps A and B learn by; configs/base.py and stages.py explain each."""

import dataclasses
from typing import Annotated

from expandr_jax.expansion.prompts import DOCUMENT_PROMPTS
from expandr_jax.generation.settings import SamplingSettings
from expandr_jax.losses.distillation import DistillationLossSettings
from expandr_jax.losses.policy import ADVANTAGES, POLICY_LOSSES, PolicySettings
from expandr_jax.losses.reranking import RERANKING_LOSSES
from expandr_jax.models.lora import OptionalLora
from expandr_jax.models.stack import REMATS
from expandr_jax.objectives.contrastive import ContrastiveConfig
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.preference import PREFERENCE_OBJECTIVES
from expandr_jax.settings import (
    MANY,
    NOT_NEGATIVE,
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveSettings(ContrastiveConfig, TrainingSettings):
    """The section `contrastive`, of step A."""

    lora: OptionalLora
    compute_dtype: ComputeType
    length_window: Annotated[int, count(0)]
    curriculum: bool
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

    loss: Annotated[str, choice(PREFERENCE_OBJECTIVES)]
    reference: Annotated[str, choice(("base", "start"))]
    prompt_length: Annotated[int, count(1)]
    response_length: Annotated[int, count(2)]  # A token and the end.
    on_bad_pair: Annotated[str, choice(("error", "drop"))]
    dev_share: Annotated[float, number(least=0, below=1)]
    keep_best: bool

    @property
    def weight_decay(self) -> float:
        """None, as in the paper: no setting is asked for it."""
        return 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoSettings(PolicySettings, SamplingSettings):
    """The section `grpo`, of step B on-policy."""

    loss: Annotated[str, choice(POLICY_LOSSES)]
    advantage: Annotated[str, choice(ADVANTAGES, empty=True)]
    steps: Annotated[int, count(1)]
    queries: Annotated[int, count(1)]
    samples: Annotated[int, count(2, MANY)]
    temperature: Positive
    resample: Annotated[int, count(0, MANY)]
    documents: Annotated[int, count(0, MANY)]
    document_prompt: Annotated[str, choice(DOCUMENT_PROMPTS)]
    document_weights: Annotated[tuple[float, ...], several(NOT_NEGATIVE, least=2)]
    mask_cut: bool
    minibatches: Annotated[int, count(1)]
    passes: Annotated[int, count(1, MANY)]
    accumulation: Annotated[int, count(1, MANY)]
    learning_rate: Positive
    warmup_steps: Annotated[int, count(0)]
    clip_norm: Positive
    chunk: Annotated[int, count(1)]
    save_every: Annotated[int, count(1)]
    watch_kl: Positive
    watch_entropy: Annotated[tuple[float, ...], several(number(least=0), least=2)]
    watch_repetitive: Share
    watch_reward: NotNegative
    watch_steps: Annotated[int, count(1)]
    on_collapse: Annotated[str, choice(("stop", "back"))]

    @property
    def batch_size(self) -> int:
        """Queries of a step, as other trainings call them."""
        return self.queries

    @property
    def groups(self) -> int:
        """Queries of a step, and documents, if it has any."""
        return self.queries * (1 + self.documents)

    @property
    def texts(self) -> int:
        """Texts of a step."""
        return self.groups * self.samples

    @property
    def updates(self) -> int:
        """Updates of a step."""
        return self.minibatches * self.passes


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillSettings(DistillationLossSettings, TrainingSettings):
    """The section `distill`, of the query tower that learns from expanded queries."""

    epochs: Annotated[float, number(least=0, most=MANY)]
    weight_decay: NotNegative
    train_queries: Annotated[int, count(0)]
    documents: Annotated[int, count(0)]
    queries_per_document: Annotated[int, count(1, MANY)]
    depth: Annotated[int, count(1)]
    control: bool


@dataclasses.dataclass(frozen=True)
class FigretSettings:
    """The section `figret`, of the turn on queries that the trained retriever fails."""

    rank: Annotated[int, count(0)]
    queries: Annotated[int, count(0)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RerankerSettings(TrainingSettings):
    """The section `reranker`, of a cross-encoder that ranks again."""

    source: str
    max_length: Annotated[int, count(1)]
    compute_dtype: ComputeType
    remat: Annotated[str, choice(REMATS)]
    loss: Annotated[str, choice(RERANKING_LOSSES)]
    negatives: Annotated[int, count(1)]
    dropout: bool
    weight_decay: NotNegative
    patience: Annotated[int, count(0)]
