"""The settings of what steps A and B learn by; configs/base.py and stages.py explain each."""

import dataclasses
from typing import Annotated

from expandr_jax.expansion.prompts import DOCUMENT_PROMPTS
from expandr_jax.generation.settings import SamplingSettings
from expandr_jax.losses.contrastive import CONTRASTIVE_LOSSES
from expandr_jax.losses.distillation import DistillationLossSettings
from expandr_jax.losses.policy import ADVANTAGES, POLICY_LOSSES, PolicySettings
from expandr_jax.losses.reranking import RERANKING_LOSSES
from expandr_jax.models.lora import OptionalLora
from expandr_jax.models.stack import REMATS
from expandr_jax.objectives.contrastive import LEAST_TEMPERATURE, ContrastiveConfig
from expandr_jax.objectives.objective import ObjectiveSettings
from expandr_jax.objectives.preference import PREFERENCE_OBJECTIVES
from expandr_jax.settings import (
    MANY,
    NOT_NEGATIVE,
    Complaints,
    ComputeType,
    NotNegative,
    Positive,
    Share,
    at_least_one,
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

    def refused(self) -> Complaints:
        """Losses that all weigh nothing, two orders of the batches, a temperature that jumps."""
        weights = [f"{name}_weight" for name in (*CONTRASTIVE_LOSSES, "query_likelihood")]
        yield from at_least_one("contrastive", self, weights)
        if self.curriculum and self.length_window:
            yield "length_window", "0, as contrastive.curriculum is set"
        # The first update would raise it to the floor, whatever the gradient says.
        if self.learn_temperature and self.temperature < LEAST_TEMPERATURE:
            yield "temperature", f"at least {LEAST_TEMPERATURE}, below which none is learned"


@dataclasses.dataclass(frozen=True)
class MiningSettings:
    """The section `mining`, of step A's hard negatives."""

    per_query: Annotated[int, count(0)]
    first: Annotated[int, count(0)]
    depth: Annotated[int, count(1)]
    absolute_margin: float | None
    relative_margin: float | None

    def refused(self) -> Complaints:
        """Results of which none is looked at."""
        if self.first >= self.depth:
            yield "first", f"less than mining.depth, {self.depth}"


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

    def refused(self) -> Complaints:
        """Texts that are all alike, and pairs of numbers that are none."""
        if self.top_k == 1:
            yield "top_k", "0 or above 1: texts of a query must differ"
        if len(self.watch_entropy) != 2 or self.watch_entropy[0] >= self.watch_entropy[1]:
            yield "watch_entropy", "two shares, the lower one first"
        if len(self.document_weights) != 2:
            yield "document_weights", "two numbers: of relevant documents and of others"

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
    samples: Annotated[tuple[int, ...], several(count(1, MANY), least=0)]
    train_queries: Annotated[int, count(0)]
    documents: Annotated[int, count(0)]
    queries_per_document: Annotated[int, count(1, MANY)]
    depth: Annotated[int, count(1)]
    control: bool

    def refused(self) -> Complaints:
        """Losses that all weigh nothing."""
        yield from at_least_one("distill", self, ("cosine_weight", "kl_weight"))


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
