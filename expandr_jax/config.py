"""A whole config, as configs/ makes them, read and checked: a tree of the sections' dataclasses."""

import dataclasses
import math
import operator
import os
from collections.abc import Mapping
from typing import Annotated, Any

from expandr_jax.data.settings import DataSettings
from expandr_jax.errors import UserError, shown
from expandr_jax.expansion.demonstrations import DemonstrationsSettings
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import strategy
from expandr_jax.generation.settings import GeneratorSettings
from expandr_jax.losses.contrastive import CONTRASTIVE_LOSSES
from expandr_jax.models.lora import LoraConfig
from expandr_jax.objectives.contrastive import LEAST_TEMPERATURE
from expandr_jax.objectives.llara import LlaraSettings
from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.registry import STEP_B, StepB
from expandr_jax.objectives.settings import (
    ContrastiveSettings,
    DistillSettings,
    DpoSettings,
    FigretSettings,
    GrpoSettings,
    MiningSettings,
    RerankerSettings,
)
from expandr_jax.objectives.warm_start import WARM_STARTS
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.ranking.systems import parse_systems
from expandr_jax.rewards.registry import REWARDS, RewardSettings, reward_weights
from expandr_jax.rewards.settings import AnswerSettings, CandidatesSettings
from expandr_jax.runtime.formats import RENAMED, read_record
from expandr_jax.runtime.settings import LogSettings
from expandr_jax.search.settings import SearchSettings
from expandr_jax.settings import MANY, choice, count, read_section
from expandr_jax.training.settings import MeshSettings
from expandr_jax.vectors.settings import RetrieverSettings
from expandr_jax.weights.settings import ExportSettings
from expandr_jax.weights.sparse_encoder import SPLADE

# At least one of these is above 0, or nothing would be learned.
AT_LEAST_ONE = (
    tuple(f"contrastive.{n}_weight" for n in (*CONTRASTIVE_LOSSES, "query_likelihood")),
    tuple(f"reward.{name}" for name in (*REWARDS, "functions")),
    tuple(f"data.shares.{name}_train" for name in ("retriever", "generator")),
    ("distill.cosine_weight", "distill.kl_weight"),
)
# Stages for which the trained adapter writes, which a server does not have.
_BY_THE_ADAPTER = {
    "distill.epochs": "the trained adapter expands its queries",
    "figret.rank": "the trained adapter writes its passages",
}
# What a query weighs beside texts that stand in its place.
_NO_WEIGHT = {
    "contrastive.query_weight": 0.0,
    "reward.query_weight": 0.0,
    "evaluation.query_weights": (0.0,),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every setting of a run, by the names that configs/base.py gives and explains."""

    seed: Annotated[int, count(0)]
    rounds: Annotated[int, count(1, MANY)]
    keep: Annotated[int, count(1)]
    step_b: Annotated[str, choice(STEP_B)]
    warm_start: Annotated[str, choice(WARM_STARTS, empty=True)]
    data: DataSettings
    retriever: RetrieverSettings
    generator: GeneratorSettings
    lora: LoraConfig
    expansion: ExpansionSettings
    llara: LlaraSettings
    contrastive: ContrastiveSettings
    mining: MiningSettings
    candidates: CandidatesSettings
    demonstrations: DemonstrationsSettings
    answer: AnswerSettings
    reward: RewardSettings
    dpo: DpoSettings
    grpo: GrpoSettings
    distill: DistillSettings
    figret: FigretSettings
    reranker: RerankerSettings
    search: SearchSettings
    evaluation: EvaluationSettings
    export: ExportSettings
    log: LogSettings
    mesh: MeshSettings

    @property
    def step_b_kind(self) -> StepB:
        """What `step_b` names."""
        return STEP_B[self.step_b]

    @property
    def learned(self) -> DpoSettings | GrpoSettings:
        """The section that step B learns by."""
        return getattr(self, self.step_b_kind.section)

    @property
    def rewarded(self) -> CandidatesSettings | GrpoSettings:
        """The section whose texts step B rewards."""
        return getattr(self, self.step_b_kind.rewarded)

    @property
    def objective(self) -> Objective | None:
        """What step B learns of a file of each round; None on-policy."""
        return self.step_b_kind.objective(self.learned)


def read_config(values: Mapping[str, Any] | Config) -> Config:
    """Reads a config, and refuses what would train nonsense, never end or fail after hours of work.

    Whether settings fit the data, the models and the devices is seen where these are known.

    Args:
        values: As from configs/, or from JSON; one that has been read comes back as it is.

    Raises:
        UserError: Naming the first setting that is wrong, its value and what was expected.
    """
    if isinstance(values, Config):
        return values
    if hasattr(values.get("dpo"), "keys") and values["dpo"].get("loss") == "reward-sft":
        raise UserError(
            "dpo.loss is 'reward-sft'; expected a loss of pairs: set step_b='reward-sft', as it is "
            "called now"
        )
    try:
        config = read_section(Config, values)
    except UserError as error:
        name = str(error).partition(":")[0]
        if name in RENAMED:
            raise UserError(f"{name}: is {RENAMED[name]} now") from None
        raise
    _check(config)
    return config


def read_run_config(path: str | os.PathLike) -> Config:
    """The config that a run keeps in its config.json; UserError if there is none that can be read.

    A version with other settings may have written it.
    """
    record = read_record(path)
    try:
        return read_config(record)
    except UserError as error:
        raise UserError(f"{path}: not a run's config as this version has it: {error}") from None


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values of some settings (name, as "dpo.beta" -> value), unchecked."""
    for name, value in settings.items():
        config = _with(config, name, value)
    return config


def _with(section: Any, name: str, value: Any) -> Any:
    first, _, rest = name.partition(".")
    value = _with(getattr(section, first), rest, value) if rest else value
    return dataclasses.replace(section, **{first: value})


def _check(config: Config) -> None:
    """Refuses settings that do not go together."""
    for names in AT_LEAST_ONE:
        if not any(operator.attrgetter(*names)(config)):
            raise _refuse(config, names[0], f"it or {' or '.join(names[1:])} above 0")
    total = math.fsum(dataclasses.astuple(config.data.shares))
    if config.data.kind == "pydoc" and abs(total - 1) > 1e-9:
        raise UserError(f"data.shares: its four parts add up to {total:.6g}; expected 1")
    if config.mining.first >= config.mining.depth:
        raise _refuse(config, "mining.first", f"less than mining.depth, {config.mining.depth}")
    texts = config.candidates
    # Greedy decoding gives the same text each time, as does choosing among one token.
    drawn = (
        0 if texts.top_k == 1 else texts.per_temperature * sum(t > 0 for t in texts.temperatures)
    )
    prompts = config.demonstrations.prompts
    candidates = texts.per_temperature * len(texts.temperatures)
    if prompts > candidates:
        fewer = f"at most the candidates of a query, {candidates}"
        raise _refuse(config, "demonstrations.prompts", fewer)
    if prompts and config.reward.answer > 0:
        expected = "0, as demonstrations.prompts is above 0: dev queries have no self-answers"
        raise _refuse(config, "reward.answer", expected)
    if drawn + (0 in texts.temperatures) < 2 and prompts < 2:
        raise _refuse(
            config, "candidates.top_k" if texts.top_k == 1 else "candidates.temperatures",
            "with candidates.per_temperature at least two different texts, to prefer one",
        )  # fmt: skip
    own = config.reward.functions
    if config.reward.function_weights and len(config.reward.function_weights) != len(own):
        one_each = f"() or a weight for each of reward.functions, {len(own)}"
        raise _refuse(config, "reward.function_weights", one_each)
    grpo, kind = config.grpo, config.step_b_kind
    most = config.rewarded.max_new_tokens
    if config.reward.length > 0 and config.reward.length_cache > most:
        longest = f"at most {kind.rewarded}.max_new_tokens, {most}"
        raise _refuse(config, "reward.length_cache", longest)
    if grpo.top_k == 1:
        raise _refuse(config, "grpo.top_k", "0 or above 1: texts of a query must differ")
    if len(grpo.watch_entropy) != 2 or grpo.watch_entropy[0] >= grpo.watch_entropy[1]:
        raise _refuse(config, "grpo.watch_entropy", "two shares, the lower one first")
    if kind.on_policy and config.generator.server.url:
        expected = f"'', as step_b is {config.step_b!r}: texts are sampled here"
        raise _refuse(config, "generator.server.url", expected)
    if grpo.documents and config.learned is grpo:
        for name, weight in reward_weights(config.reward).items():
            if (weight > 0) is not (name == "group"):
                expected = "()" if name not in REWARDS else "above 0" if name == "group" else "0"
                field = name if name in REWARDS else "functions"
                expected = f"{expected}, as grpo.documents is above 0"
                raise _refuse(config, f"reward.{field}", expected)
        if config.reward.search == "fused":
            expected = "'dense' or 'bm25', as grpo.documents is above 0"
            raise _refuse(config, "reward.search", expected)
        if grpo.resample:
            raise _refuse(config, "grpo.resample", "0, as grpo.documents is above 0")
    if len(grpo.document_weights) != 2:
        expected = "two numbers: of relevant documents and of others"
        raise _refuse(config, "grpo.document_weights", expected)
    for name, why in _BY_THE_ADAPTER.items():
        if operator.attrgetter(name)(config) and config.generator.server.url:
            raise _refuse(config, "generator.server.url", f"'', as {name} is above 0: {why}")
    step_a = config.contrastive
    if config.retriever.weights != "float32" and not step_a.lora.rank:
        raise _refuse(
            config, "retriever.weights", "'float32', as contrastive.lora.rank is 0: all are trained"
        )
    if step_a.curriculum and step_a.length_window:
        raise _refuse(config, "contrastive.length_window", "0, as contrastive.curriculum is set")
    if config.retriever.pooling == SPLADE and step_a.lora.rank:
        expected = "0, as retriever.pooling is 'splade': all weights are trained"
        raise _refuse(config, "contrastive.lora.rank", expected)
    if config.llara.epochs and step_a.query_likelihood_weight:
        expected = "0, as llara.epochs is above 0: vectors are of eight tokens, not of the end's"
        raise _refuse(config, "contrastive.query_likelihood_weight", expected)
    # The first update would raise a learned temperature to its floor, whatever the gradient says.
    if step_a.learn_temperature and step_a.temperature < LEAST_TEMPERATURE:
        raise _refuse(
            config, "contrastive.temperature",
            f"at least {LEAST_TEMPERATURE}, below which none is learned",
        )  # fmt: skip
    # Longer vectors would have sharper shares, whatever they say.
    for name in REWARDS:
        graded = getattr(config.reward, f"{name}_measure", None) == "softmax_share"
        if graded and getattr(config.reward, name) and step_a.normalize not in ("after", "both"):
            expected = f'"after" or "both", as reward.{name}_measure is "softmax_share"'
            raise _refuse(config, "contrastive.normalize", expected)
    try:
        parse_systems(config.evaluation.systems)
    except UserError as error:
        raise UserError(f"evaluation.systems: {error}") from None
    own = strategy(config.expansion.strategy, config.expansion.template)  # Refuses a wrong one.
    if prompts and not (len(own.steps) == 1 and own.asks[-1].prompt.of_query_alone):
        expected = "a strategy that asks once, for the query alone, as demonstrations.prompts is"
        raise _refuse(config, "expansion.strategy", f"{expected} above 0")
    if own.replaces:
        for name, none in _NO_WEIGHT.items():
            if operator.attrgetter(name)(config) != none:
                text = f"the text of {config.expansion.strategy!r} stands in the query's place"
                raise _refuse(config, name, f"{none}, as {text}")


def _refuse(config: Config, name: str, expected: str) -> UserError:
    return UserError(f"{name} is {shown(operator.attrgetter(name)(config))}; expected {expected}")
