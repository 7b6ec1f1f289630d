"""What each setting of a config may be, checked before a model is loaded or a stage runs."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args

import ml_collections

from expandr_jax.errors import UserError
from expandr_jax.expansion.strategies import STRATEGIES, strategy
from expandr_jax.models.pooling import Pooling
from expandr_jax.models.stack import REMATS
from expandr_jax.objectives.candidates import LOSSES_OF_PAIRS, REWARD_SFT
from expandr_jax.objectives.contrastive import LEAST_TEMPERATURE
from expandr_jax.pair import WEIGHTS
from expandr_jax.ranking.fusion import Normalize
from expandr_jax.ranking.systems import parse_systems
from expandr_jax.rewards.search import MEASURES
from expandr_jax.search.scann import METHODS, STORAGES
from expandr_jax.vectors.stored import DTYPES
from expandr_jax.weights.fields import shown

FLOATS = ("float32", "bfloat16")
BACKENDS = ("auto", "scann", "exact")
_LARGEST_COUNT = 2**31 - 1
_LARGEST = 1e38  # What float32 can hold.
_MANY = 10_000  # More of what is done again and again would not end.


@dataclasses.dataclass(frozen=True)
class Check:
    """What a setting has to be.

    Attributes:
        expected: In words, for messages.
        holds: Whether a value is that.
    """

    expected: str
    holds: Callable[[Any], bool]


def _count(least: int, most: int = _LARGEST_COUNT) -> Check:
    """A whole number from `least` to `most`, both included."""
    return Check(
        f"a whole number from {least} to {most}",
        lambda value: _is_a(int, value) and least <= value <= most,
    )


def _number(
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Check:
    """A finite number within bounds."""
    bounds = {"above": above, "at least": least, "below": below, "at most": most}
    words = " and".join(f" {name} {bound}" for name, bound in bounds.items() if bound is not None)

    def holds(value: Any) -> bool:
        # NaN is not within any bounds.
        return (
            _is_a((int, float), value)
            and abs(value) <= _LARGEST
            and (above is None or value > above)
            and (least is None or value >= least)
            and (below is None or value < below)
            and (most is None or value <= most)
        )

    return Check(f"a finite number{words}", holds)


def _choice(known: Sequence[str], *, empty: bool = False) -> Check:
    """One of some strings, or, if `empty`, none of them."""
    return Check(
        f"one of {', '.join(known)}" + (", or ''" if empty else ""),
        lambda value: isinstance(value, str) and (value in known or (empty and not value)),
    )


def _optional(check: Check) -> Check:
    """The same, or None."""
    return Check(f"{check.expected}, or None", lambda value: value is None or check.holds(value))


def _several(each: Check, *, least: int = 1) -> Check:
    """A tuple of at least so many values."""
    return Check(
        f"{'a tuple' if least else 'an empty tuple or one'} of values that each are "
        f"{each.expected}",
        lambda value: (
            _is_a((tuple, list), value) and len(value) >= least and all(map(each.holds, value))
        ),
    )


def _is_a(kind: type | tuple[type, ...], value: Any) -> bool:
    """As `isinstance`, but true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and value != "" and re.compile(value) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _ascends(value: Any) -> bool:
    counts = _several(_count(1))
    return counts.holds(value) and all(a < b for a, b in itertools.pairwise(value))


_POSITIVE, _NOT_NEGATIVE = _number(above=0), _number(least=0)
_SHARE = _number(least=0, most=1)
_TOP_P = _number(above=0, most=1)
_EPOCHS = _number(above=0, most=_MANY)
_PENALTY = _number(least=0.1, most=10)  # Beyond these, logits are all or nothing.
_TEXT = Check("a string that is not empty", lambda value: isinstance(value, str) and value != "")
_SHA256 = _optional(
    Check(
        "the 64 hexadecimal digits of a sha256, or ''",
        lambda value: isinstance(value, str) and re.fullmatch("([0-9a-fA-F]{64})?", value),
    )
)

CHECKS = {
    "seed": _count(0),
    "rounds": _count(1, _MANY),
    "keep": _count(1),
    "data.min_pairs": _count(0),
    "data.shares.retriever_train": _NOT_NEGATIVE,
    "data.shares.generator_train": _NOT_NEGATIVE,
    "data.shares.dev": _NOT_NEGATIVE,
    "data.shares.test": _NOT_NEGATIVE,
    "data.max_retriever_train": _count(0),
    "data.max_generator_train": _count(0),
    "data.max_dev": _count(0),
    "data.max_test": _count(0),
    "retriever.sha256": _SHA256,
    "retriever.pooling": _choice(get_args(Pooling), empty=True),
    "retriever.max_length": _count(1),
    "retriever.compute_dtype": _choice(FLOATS),
    "retriever.vectors": _choice(DTYPES),
    "retriever.tokens_per_batch": _count(1),
    "generator.sha256": _SHA256,
    "generator.compute_dtype": _choice(FLOATS),
    "generator.weights": _choice(WEIGHTS, empty=True),
    "generator.remat": _choice(REMATS),
    "generator.stop": _several(_TEXT, least=0),
    "generator.slots": _count(1),
    "generator.memory_limit": _NOT_NEGATIVE,
    "generator.prompt_buckets": Check("a tuple of whole numbers above 0 that ascend", _ascends),
    "generator.server.concurrency": _count(1),
    "generator.server.retries": _count(0),
    "generator.server.timeout": _POSITIVE,
    "lora.rank": _count(1),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _number(least=0, below=1),
    "lora.targets": _several(Check("a regular expression", _is_pattern)),
    "expansion.strategy": _choice(tuple(STRATEGIES)),
    "expansion.temperature": _NOT_NEGATIVE,
    "expansion.top_p": _TOP_P,
    "expansion.top_k": _count(0),
    "expansion.min_p": _SHARE,
    "expansion.repetition_penalty": _PENALTY,
    "expansion.max_new_tokens": _count(1),
    "expansion.train_samples": _count(0, _MANY),
    "contrastive.compute_dtype": _choice(FLOATS),
    "contrastive.epochs": _EPOCHS,
    "contrastive.batch_size": _count(1),
    "contrastive.accumulation": _count(1, _MANY),
    "contrastive.length_window": _count(0),
    "contrastive.learning_rate": _POSITIVE,
    "contrastive.warmup_steps": _count(0),
    "contrastive.weight_decay": _NOT_NEGATIVE,
    "contrastive.clip_norm": _POSITIVE,
    "contrastive.temperature": _POSITIVE,
    "contrastive.query_weight": _SHARE,
    "contrastive.normalize": _choice(get_args(Normalize)),
    "contrastive.negatives": _count(0),
    "contrastive.plain_share": _SHARE,
    "contrastive.remat": _choice(REMATS),
    "contrastive.micro_batch": _count(0),
    "contrastive.info_nce_weight": _NOT_NEGATIVE,
    "contrastive.margin_mse_weight": _NOT_NEGATIVE,
    "contrastive.kl_weight": _NOT_NEGATIVE,
    "contrastive.teacher_temperature": _POSITIVE,
    "contrastive.invariance_weight": _NOT_NEGATIVE,
    "contrastive.dimensions": _several(_count(1), least=0),
    "contrastive.eval_every": _count(0),
    "contrastive.patience": _count(0),
    "contrastive.save_every": _count(1),
    "mining.per_query": _count(0),
    "mining.first": _count(0),
    "mining.depth": _count(1),
    "mining.absolute_margin": _optional(_number()),
    "mining.relative_margin": _optional(_number()),
    "candidates.temperatures": _several(_NOT_NEGATIVE),
    "candidates.per_temperature": _count(1, _MANY),
    "candidates.top_p": _TOP_P,
    "candidates.top_k": _count(0),
    "candidates.min_p": _SHARE,
    "candidates.repetition_penalty": _PENALTY,
    "candidates.max_new_tokens": _count(1),
    "answer.temperature": _NOT_NEGATIVE,
    "answer.top_p": _TOP_P,
    "answer.top_k": _count(0),
    "answer.min_p": _SHARE,
    "answer.repetition_penalty": _PENALTY,
    "answer.max_new_tokens": _count(1),
    "answer.max_characters": _count(1),
    "reward.positive": _NOT_NEGATIVE,
    "reward.answer": _NOT_NEGATIVE,
    "reward.corpus": _NOT_NEGATIVE,
    "reward.corpus_measure": _choice(MEASURES),
    "reward.corpus_temperature": _POSITIVE,
    "reward.group": _NOT_NEGATIVE,
    "reward.group_size": _count(1),
    "reward.group_sets": _count(1, _MANY),
    "reward.query_weight": _SHARE,
    "reward.depth": _count(1),
    "reward.threshold": _number(),
    "dpo.loss": _choice((*LOSSES_OF_PAIRS, REWARD_SFT)),
    "dpo.reward_temperature": _POSITIVE,
    "dpo.beta": _POSITIVE,
    "dpo.label_smoothing": _number(least=0, below=0.5),
    "dpo.sft_weight": _NOT_NEGATIVE,
    "dpo.epochs": _EPOCHS,
    "dpo.batch_size": _count(1),
    "dpo.accumulation": _count(1, _MANY),
    "dpo.learning_rate": _POSITIVE,
    "dpo.warmup_steps": _count(0),
    "dpo.clip_norm": _POSITIVE,
    "dpo.prompt_length": _count(1),
    "dpo.response_length": _count(2),  # A token and the end.
    "dpo.on_bad_pair": _choice(("error", "drop")),
    "dpo.dev_share": _number(least=0, below=1),
    "dpo.eval_every": _count(0),
    "dpo.chunk": _count(1),
    "dpo.save_every": _count(1),
    "search.backend": _choice(BACKENDS),
    "search.exact.block_rows": _count(1),
    "search.exact.query_rows": _count(1),
    "search.scann.method": _choice(METHODS),
    "search.scann.ah_from": _count(0),
    "search.scann.tree_from": _count(0),
    "search.scann.leaves": _optional(_count(1)),
    "search.scann.leaves_to_search": _optional(_count(1)),
    "search.scann.tree_sample": _count(1),
    "search.scann.tree_iterations": _count(1, _MANY),
    "search.scann.soar": _optional(_NOT_NEGATIVE),
    "search.scann.dimensions_per_block": _count(1),
    "search.scann.anisotropic_threshold": _number(least=0, below=1),
    "search.scann.ah_sample": _count(1),
    "search.scann.ah_iterations": _count(1, _MANY),
    "search.scann.reorder": _count(1),
    "search.scann.storage": _choice(STORAGES),
    "evaluation.systems": _several(_TEXT),
    "evaluation.query_weights": _several(_SHARE),
    "evaluation.samples": _several(_count(1, _MANY)),
    "evaluation.depth": _count(1),
    "evaluation.sample_depth": _count(1),
    "export.dtype": _choice(FLOATS),
    "log.peak_flops": _optional(_POSITIVE),
    "log.profile_steps": _count(0),
}
# Of these at least one is above 0, or nothing would be learned.
WEIGHED = (
    tuple(f"contrastive.{n}_weight" for n in ("info_nce", "margin_mse", "kl", "invariance")),
    tuple(f"reward.{name}" for name in ("positive", "answer", "corpus", "group")),
    tuple(f"data.shares.{name}_train" for name in ("retriever", "generator")),
)


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Refuses what would train nonsense, never end or fail after hours of work.

    Whether settings fit the data, the models and the devices is seen where these are known.

    Args:
        config: The whole config.

    Raises:
        UserError: Naming the first setting that is wrong, its value and what was expected.
    """
    for name, check in CHECKS.items():
        if not check.holds(value_of(config, name)):
            raise _refuse(config, name, check.expected)
    for names in WEIGHED:
        if not any(value_of(config, name) for name in names):
            raise _refuse(config, names[0], f"it or {' or '.join(names[1:])} above 0")
    total = math.fsum(config.data.shares.values())
    if config.data.kind == "pydoc" and abs(total - 1) > 1e-9:
        raise UserError(f"data.shares: its four parts add up to {total:.6g}; expected 1")
    if config.mining.first >= config.mining.depth:
        raise _refuse(config, "mining.first", f"less than mining.depth, {config.mining.depth}")
    texts = config.candidates
    # Greedy decoding gives the same text each time, as does choosing among one token.
    drawn = (
        0 if texts.top_k == 1 else texts.per_temperature * sum(t > 0 for t in texts.temperatures)
    )
    if drawn + (0 in texts.temperatures) < 2:
        raise _refuse(
            config, "candidates.top_k" if texts.top_k == 1 else "candidates.temperatures",
            "with candidates.per_temperature at least two different texts, to prefer one",
        )  # fmt: skip
    step_a = config.contrastive
    # Below its floor a learned temperature has no gradient: it would stay there.
    if step_a.learn_temperature and step_a.temperature < LEAST_TEMPERATURE:
        raise _refuse(
            config, "contrastive.temperature",
            f"at least {LEAST_TEMPERATURE}, below which none is learned",
        )  # fmt: skip
    # Longer vectors would have sharper shares, whatever they say.
    graded = config.reward.corpus > 0 and config.reward.corpus_measure == "softmax_share"
    if graded and step_a.normalize not in ("after", "both"):
        raise _refuse(
            config, "contrastive.normalize",
            '"after" or "both", as reward.corpus_measure is "softmax_share"',
        )  # fmt: skip
    try:
        parse_systems(config.evaluation.systems)
    except UserError as error:
        raise UserError(f"evaluation.systems: {error}") from None
    strategy(config.expansion.strategy, config.expansion.template)  # Refuses a wrong template.


def value_of(config: ml_collections.ConfigDict, name: str) -> Any:
    """A setting by its name, as "dpo.beta"."""
    return functools.reduce(getattr, name.split("."), config)


def _refuse(config: ml_collections.ConfigDict, name: str, expected: str) -> UserError:
    return UserError(f"{name} is {shown(value_of(config, name))}; expected {expected}")
