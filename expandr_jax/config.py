"""A whole config, as configs/ makes them, read and checked: a tree of the sections' dataclasses."""

import dataclasses
import operator
import os
from collections.abc import Mapping
from typing import Annotated, Any

from expandr_jax.data.settings import DataSettings
from expandr_jax.errors import UserError
from expandr_jax.expansion.demonstrations import DemonstrationsSettings
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import strategy
from expandr_jax.generation.settings import GeneratorSettings
from expandr_jax.models.lora import LoraConfig
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
from expandr_jax.rewards.search import SEARCH_MEASURES
from expandr_jax.rewards.searches import REWARD_SEARCHES
from expandr_jax.rewards.settings import AnswerSettings, CandidatesSettings
from expandr_jax.runtime.formats import RENAMED, read_record
from expandr_jax.runtime.settings import LogSettings
from expandr_jax.search.settings import SearchSettings
from expandr_jax.settings import MANY, Complaints, choice, count, read_section
from expandr_jax.training.settings import MeshSettings
from expandr_jax.vectors.settings import RetrieverSettings
from expandr_jax.weights.settings import ExportSettings
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING

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

    def refused(self) -> Complaints:
        """What does not go with settings of other sections."""
        for check in _CHECKS:
            yield from check(self)

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
        return read_section(Config, values)
    except UserError as error:
        name = str(error).partition(":")[0]
        if name in RENAMED:
            raise UserError(f"{name}: is {RENAMED[name]} now") from None
        raise


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


def _prompts(config: Config) -> Complaints:
    """Prompts with examples, which candidates and dev queries have to be there for."""
    prompts, texts = config.demonstrations.prompts, config.candidates
    candidates = texts.per_temperature * len(texts.temperatures)
    if prompts > candidates:
        yield "demonstrations.prompts", f"at most the candidates of a query, {candidates}"
    for name, reward in REWARDS.items():
        if prompts and reward.answers and getattr(config.reward, name) > 0:
            none = "0, as demonstrations.prompts is above 0: dev queries have no self-answers"
            yield f"reward.{name}", none
    own = strategy(config.expansion.strategy, config.expansion.template)
    if prompts and not (len(own.steps) == 1 and own.asks[-1].prompt.of_query_alone):
        one = "a strategy that asks once, for the query alone, as demonstrations.prompts is above 0"
        yield "expansion.strategy", one


def _candidates(config: Config) -> Complaints:
    """Candidates of which none can be preferred."""
    texts = config.candidates
    # Greedy decoding gives the same text each time, as does choosing among one token.
    drawn = (
        0 if texts.top_k == 1 else texts.per_temperature * sum(t > 0 for t in texts.temperatures)
    )
    if drawn + (0 in texts.temperatures) < 2 and config.demonstrations.prompts < 2:
        name = "candidates.top_k" if texts.top_k == 1 else "candidates.temperatures"
        yield name, "with candidates.per_temperature at least two different texts, to prefer one"


def _rewards(config: Config) -> Complaints:
    """Rewards whose settings do not fit the texts, or the vectors, that they are of."""
    most, section = config.rewarded.max_new_tokens, config.step_b_kind.rewarded
    if config.reward.length > 0 and config.reward.length_cache > most:
        yield "reward.length_cache", f"at most {section}.max_new_tokens, {most}"
    # Longer vectors would have sharper shares, whatever they say.
    for name, measure in config.reward.measures.items():
        any_length = config.contrastive.normalize not in ("after", "both")
        if SEARCH_MEASURES[measure].scores and any_length:
            unit = f'"after" or "both", as reward.{name}_measure is "{measure}"'
            yield "contrastive.normalize", unit


def _server(config: Config) -> Complaints:
    """A server of the generator as it was, where what is trained has to write."""
    if not config.generator.server.url:
        return
    if config.step_b_kind.on_policy:
        yield "generator.server.url", f"'', as step_b is {config.step_b!r}: texts are sampled here"
    for name, why in _BY_THE_ADAPTER.items():
        if operator.attrgetter(name)(config):
            yield "generator.server.url", f"'', as {name} is above 0: {why}"


def _documents(config: Config) -> Complaints:
    """Rewards of queries alone, where texts of documents are learned with theirs."""
    if not config.grpo.documents or config.learned is not config.grpo:
        return
    why = "as grpo.documents is above 0"
    for name, weight in reward_weights(config.reward).items():
        if (weight > 0) is not (name == "group"):
            expected = "()" if name not in REWARDS else "above 0" if name == "group" else "0"
            field = name if name in REWARDS else "functions"
            yield f"reward.{field}", f"{expected}, {why}"
    if (search := REWARD_SEARCHES[config.reward.search]).vectors and search.words:
        yield "reward.search", f"'dense' or 'bm25', {why}"
    if config.grpo.resample:
        yield "grpo.resample", f"0, {why}"


def _step_a(config: Config) -> Complaints:
    """Weights that are trained and kept in too few bits, and losses that a retriever has not."""
    rank = config.contrastive.lora.rank
    if config.retriever.weights != "float32" and not rank:
        all_trained = "'float32', as contrastive.lora.rank is 0: all are trained"
        yield "retriever.weights", all_trained
    if config.retriever.pooling == SPLADE_POOLING and rank:
        all_trained = "0, as retriever.pooling is 'splade': all weights are trained"
        yield "contrastive.lora.rank", all_trained
    if config.llara.epochs and config.contrastive.query_likelihood_weight:
        none = "0, as llara.epochs is above 0: vectors are of eight tokens, not of the end's"
        yield "contrastive.query_likelihood_weight", none


def _systems(config: Config) -> Complaints:
    """Names of systems that there are not."""
    try:
        parse_systems(config.evaluation.systems)
    except UserError as error:
        raise UserError(f"evaluation.systems: {error}") from None
    yield from ()


def _strategy(config: Config) -> Complaints:
    """A template that no strategy takes; weights of a query in whose place a text stands."""
    name = config.expansion.strategy
    if strategy(name, config.expansion.template).replaces:
        for setting, none in _NO_WEIGHT.items():
            if operator.attrgetter(setting)(config) != none:
                yield setting, f"{none}, as the text of {name!r} stands in the query's place"


# What no section can see alone.
_CHECKS = (
    _prompts, _candidates, _rewards, _server, _documents, _step_a, _systems, _strategy,
)  # fmt: skip
