"""Wrong settings are refused by name, at once; those of every config pass."""

import dataclasses
import importlib
import json
import math
import pathlib

import pytest

from configs import base, paper, published, reference_code, strategies
from expandr_jax.config import Config, read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.objectives.settings import MiningSettings
from expandr_jax.settings import fields_of, read_section
from tests.commands import command
from tests.configs_test import CONFIGS, NAMES, flatten

# Where each of these is read, it is checked against the files, the models or the devices.
ELSEWHERE = (
    "data.kind", "data.path", "data.url", "data.sha256", "data.md5", "data.cache", "data.tests",
    "data.weights",
    "data.prepared", "data.dev", "data.on_bad", "data.packages", "retriever.source",
    "retriever.shape", "retriever.normalize", "generator.source",
    "generator.shape", "generator.server.url", "generator.server.model",
    "expansion.template", "log.wandb", "evaluation.rerank.source", "evaluation.splade.source",
    "reranker.source",
)  # fmt: skip
MESH = "mesh."

COUNT, POSITIVE = "a whole number from 1 to 2147483647", "a finite number above 0"
NOT_NEGATIVE, SHARE = "a finite number at least 0", "a finite number at least 0 and at most 1"
FROM_0 = "a whole number from 0 to 2147483647"
EPOCHS = "a finite number above 0 and at most 10000"
MANY = "a whole number from 1 to 10000"
LEARNED = [f"{section}.{name}" for section in ("dpo", "contrastive") for name in (
    "learning_rate", "clip_norm")]  # fmt: skip
WRONG = [
    *((name, value, POSITIVE) for name in (*LEARNED, "dpo.beta", "dpo.reward_temperature",
      "contrastive.temperature", "contrastive.teacher_temperature", "lora.alpha",
      "generator.server.timeout", "log.peak_flops")
      for value in (0.0, -1.0, math.nan, math.inf, 1e39)),
    *((f"{section}.epochs", value, EPOCHS) for section in ("dpo", "contrastive")
      for value in (0.0, -1.0, math.nan, math.inf, 1e12)),
    *((name, value, NOT_NEGATIVE) for name in ("dpo.sft_weight", "contrastive.weight_decay",
      "contrastive.info_nce_weight", "contrastive.margin_mse_weight", "contrastive.kl_weight",
      "contrastive.invariance_weight", "expansion.temperature", "answer.temperature", "dpo.gamma",
      "generator.memory_limit", "reward.positive", "reward.answer", "reward.corpus", "reward.group",
      "reward.gain", "reward.length", "reward.format", "data.shares.dev")
      for value in (-0.1, math.nan, math.inf)),
    *((name, value, SHARE) for name in ("contrastive.query_weight", "contrastive.plain_share",
      "reward.query_weight") for value in (-0.1, 1.1, math.nan)),
    *((f"{section}.top_p", value, "a finite number above 0 and at most 1")
      for section in ("expansion", "candidates", "answer") for value in (0.0, 1.1, math.nan)),
    *((f"{section}.{name}", value, expected) for section in ("expansion", "candidates", "answer")
      for name, values, expected in (
          ("top_k", (-1, True), FROM_0), ("min_p", (-0.1, 1.1, math.nan), SHARE),
          ("repetition_penalty", (0.0, 1e-38, 11.0, math.nan), "at least 0.1 and at most 10"))
      for value in values),
    *((name, value, COUNT) for name in ("dpo.batch_size", "dpo.prompt_length", "dpo.chunk",
      "dpo.save_every", "contrastive.batch_size", "contrastive.save_every", "retriever.max_length",
      "retriever.tokens_per_batch", "generator.slots", "lora.rank", "expansion.max_new_tokens",
      "candidates.max_new_tokens", "answer.max_new_tokens", "answer.max_characters",
      "evaluation.depth", "evaluation.sample_depth", "evaluation.rerank.depth",
      "evaluation.rerank.max_length", "mining.depth", "reward.depth",
      "reward.group_size", "keep", "generator.server.concurrency") for value in (0, -1)),
    *((name, value, MANY) for name in ("rounds", "dpo.accumulation", "contrastive.accumulation",
      "candidates.per_temperature", "reward.group_sets")
      for value in (0, 10**9)),
    *((name, -1, FROM_0) for name in ("seed", "dpo.warmup_steps", "dpo.eval_every",
      "contrastive.warmup_steps", "contrastive.eval_every", "contrastive.patience",
      "contrastive.micro_batch", "contrastive.negatives", "mining.per_query", "mining.first",
      "data.max_dev", "data.min_pairs", "log.profile_steps", "generator.server.retries")),
    ("seed", 2**31, FROM_0),
    ("expansion.train_samples", -1, "a whole number from 0 to 10000"),
    ("seed", True, FROM_0),
    ("dpo.beta", None, POSITIVE),
    ("dpo.loss", "dpo", "one of sigmoid, hinge, ipo, robust, simpo"),
    ("dpo.loss", "reward-sft", "step_b"),
    ("step_b", "ppo", "one of dpo, reward-sft, grpo"),
    ("grpo.loss", "ppo", "one of grpo, dr_grpo, dapo, gspo, rloo, cispo"),
    ("grpo.samples", 1, "a whole number from 2 to 10000"),
    ("grpo.temperature", 0.0, "a finite number above 0"),
    ("grpo.top_k", 1, "0 or above 1"),
    ("grpo.watch_entropy", (3.0, 0.1), "two shares, the lower one first"),
    ("grpo.on_collapse", "go on", "one of stop, back"),
    ("distill.epochs", -1.0, "a finite number at least 0 and at most 10000"),
    ("distill.cosine_weight", 0.0, "or distill.kl_weight above 0"),
    ("distill.kl_weight", -0.1, NOT_NEGATIVE),
    ("distill.temperature", 0.0, POSITIVE),
    ("distill.queries_per_document", 0, MANY),
    ("distill.documents", -1, FROM_0),
    ("distill.depth", 0, COUNT),
    ("distill.samples", (2, 0), "an empty tuple or one of values that each are a whole"),
    ("dpo.label_smoothing", 0.5, "a finite number at least 0 and below 0.5"),
    ("dpo.label_smoothing", -0.1, "a finite number at least 0 and below 0.5"),
    ("dpo.response_length", 1, "a whole number from 2 to 2147483647"),
    ("dpo.dev_share", 1.0, "a finite number at least 0 and below 1"),
    ("dpo.dev_share", -0.1, "a finite number at least 0 and below 1"),
    ("dpo.on_bad_pair", "skip", "one of error, drop"),
    ("contrastive.normalize", "all", "one of none, before, after, both"),
    ("contrastive.remat", "some", "one of none, dots, full"),
    ("contrastive.compute_dtype", "float", "one of float32, bfloat16"),
    ("contrastive.dimensions", (8, 0), f"values that each are {COUNT}"),
    ("contrastive.dimensions", (8.5,), f"values that each are {COUNT}"),
    ("contrastive.info_nce_weight", 0.0, "or contrastive.query_likelihood_weight above 0"),
    *((f"{model}.sha256", value, "the 64 hexadecimal digits of a sha256, or ''")
      for model in ("retriever", "generator") for value in ("00", 64 * "G", 65 * "0")),
    ("retriever.pooling", "max", "one of mean, cls, last, decoder, splade, block, or ''"),
    ("retriever.compute_dtype", "int8", "one of float32, bfloat16"),
    ("retriever.vectors", "int4", "one of float32, float16, bfloat16, int8"),
    ("generator.compute_dtype", "int8", "one of float32, bfloat16"),
    ("generator.weights", "int2", "one of float32, bfloat16, int8, int4, nf4, or ''"),
    ("generator.remat", "", "one of none, dots, full"),
    ("generator.stop", ("\n", ""), "each are a string that is not empty"),
    *(("generator.prompt_buckets", value, "whole numbers above 0 that ascend")
      for value in ((), (64, 64), (128, 64), (0, 64), ("64",), (64.0,), (True, 64))),
    ("lora.dropout", 1.0, "a finite number at least 0 and below 1"),
    ("lora.targets", (), "a tuple of values that each are a regular expression"),
    ("lora.targets", ("q_proj$", "("), "a regular expression"),
    ("lora.targets", ("",), "a regular expression"),
    ("lora.targets", (1,), "a regular expression"),
    ("expansion.strategy", "q2x", "one of q2d, "),
    ("expansion.template", "{query} {document}", "a template that shows {query} and, at most, "),
    ("candidates.temperatures", (), f"a tuple of values that each are {NOT_NEGATIVE}"),
    ("candidates.temperatures", (1.0, math.nan), NOT_NEGATIVE),
    ("candidates.temperatures", ("1",), NOT_NEGATIVE),
    ("mining.absolute_margin", math.nan, "a finite number, or None"),
    ("mining.first", 50, "less than mining.depth, 50"),
    ("reward.corpus_measure", "mrr", "one of reciprocal_rank, ndcg, average_precision"),
    ("reward.search", "colbert", "one of dense, bm25, fused"),
    ("reward.length_cache", 0, COUNT),
    ("reward.format_pattern", "(", "a regular expression"),
    ("reward.corpus_temperature", 0.0, "a finite number above 0"),
    ("reward.threshold", math.nan, "a finite number"),
    ("mesh.sampling", (1, 2), "(data, fsdp, tensor), or () for mesh's"),
    ("mesh.dpo", (1, 1, True), "(data, fsdp, tensor), or () for mesh's"),
    ("search.backend", "faiss", "one of auto, scann, exact"),
    ("search.exact.block_rows", 0, COUNT),
    ("search.scann.method", "hnsw", "one of auto, brute, ah, tree"),
    ("search.scann.leaves", 0, f"{COUNT}, or None"),
    ("search.scann.soar", math.nan, f"{NOT_NEGATIVE}, or None"),
    ("search.scann.anisotropic_threshold", 1.0, "a finite number at least 0 and below 1"),
    ("search.scann.storage", "int4", "one of float32, bfloat16, int8"),
    ("evaluation.systems", (), "a tuple of values that each are a string"),
    ("evaluation.query_weights", (0.5, 1.5), SHARE),
    ("evaluation.query_weights", (), SHARE),
    ("evaluation.samples", (1, 0), MANY),
    ("evaluation.listwise.window", 1, "a whole number from 2 to 2147483647"),
    ("evaluation.listwise.depths", (10, 0), COUNT),
    ("evaluation.samples", (), MANY),
    ("export.dtype", "int8", "one of float32, bfloat16"),
]  # fmt: skip


def changed(**settings):
    config = base.get_config()
    config.update_from_flattened_dict(settings)
    return config


@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_wrong_setting_is_named_with_what_was_expected(name, value, expected):
    with pytest.raises(UserError) as error:
        read_config(changed(**{name: value}))
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}; expected ")
    assert expected in message.partition("; expected ")[2]
    assert "\n" not in message


def test_a_section_refuses_by_itself_what_does_not_go_together():
    values = base.get_config().mining.to_dict() | {"first": 50}
    with pytest.raises(UserError, match=r"^mining\.first is 50; expected less than mining\.depth"):
        read_section(MiningSettings, values, "mining.")


def test_a_system_that_is_none_is_told_in_a_line():
    with pytest.raises(UserError, match=r"^evaluation\.systems: system 'dens' is unknown; .* bm25"):
        read_config(changed(**{"evaluation.systems": ("bm25", "dens")}))


def test_a_temperature_below_the_floor_cannot_be_learned():
    read_config(changed(**{"contrastive.temperature": 0.005}))
    learned = {"contrastive.temperature": 0.005, "contrastive.learn_temperature": True}
    with pytest.raises(UserError, match=r"^contrastive\.temperature is 0\.005; expected at least"):
        read_config(changed(**learned))


@pytest.mark.parametrize(
    "settings",
    [
        {f"reward.{name}": 0.0 for name in ("positive", "answer", "corpus", "group")},
        {f"data.shares.{name}_train": 0.0 for name in ("retriever", "generator")},
    ],
)
def test_weights_that_are_all_0_are_refused(settings):
    with pytest.raises(UserError, match=f"^{min(settings)} is 0.0|^{max(settings)} is 0.0"):
        read_config(changed(**settings))


ALONE = {
    "contrastive.query_weight": 0.0, "reward.query_weight": 0.0,
    "evaluation.query_weights": (0.0,),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_a_text_that_replaces_the_query_leaves_it_no_weight(name):
    section, field = name.split(".")
    settings = {"expansion.strategy": "rewrite", **ALONE, name: base.get_config()[section][field]}
    with pytest.raises(UserError, match=rf"{name} is .*; expected .*0.0.*'rewrite' stands in"):
        read_config(changed(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"dpo.epochs": 1, "dpo.beta": 1, "lora.alpha": 16},  # Whole numbers are numbers.
        {"candidates.temperatures": (0, 1), "expansion.temperature": 0.0},  # Greedy.
        {"contrastive.info_nce_weight": 0.0, "contrastive.kl_weight": 1.0},
        {"contrastive.dimensions": (32, 8), "generator.stop": ("\n",)},
        {"evaluation.query_weights": (0, 1), "dpo.response_length": 2, "seed": 2**31 - 1},
        {"expansion.train_samples": 0, "contrastive.eval_every": 0},
        {"expansion.strategy": "q2q", "expansion.template": "Say what {query} means."},
        {"expansion.strategy": "lamer"},
        {"expansion.strategy": "rewrite", **ALONE},
        {"expansion.template": "{query} {passages}"},
    ],
)
def test_what_has_a_meaning_passes(settings):
    read_config(changed(**settings))


@pytest.mark.parametrize("name", ["base", *NAMES])
def test_the_settings_of_a_config_pass(name):
    read_config(importlib.import_module(f"configs.{name}").get_config())


def test_the_settings_of_a_config_s_variants_pass():
    variants = [paper.get_config(name) for name in paper.RETRIEVERS]
    variants += [reference_code.get_config(name) for name in reference_code.RETRIEVERS]
    variants += [published.get_config(name) for name in published.CHECKPOINTS]
    for config in (*variants, strategies.get_config("pydoc")):
        read_config(config)


def test_every_setting_is_checked_here_or_where_it_is_read():
    checks = dict(checks_of(Config))
    assert sorted(checks) == sorted(name for name, _ in flatten(base.get_config()))
    for name, check in checks.items():
        ranged = check.expected not in ("a string", "a whole number", "a tuple")
        assert ranged or name in ELSEWHERE or name.startswith(MESH), name


def checks_of(section, prefix=""):
    """(name, check) of every setting."""
    for name, check in fields_of(section).items():
        if isinstance(check, type):
            yield from checks_of(check, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", check


def defaults_of(section, prefix=""):
    """(name, default, value) of every setting that has a default."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from defaults_of(value, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            yield f"{prefix}{field.name}", field.default, value


def test_what_code_has_without_a_config_is_what_base_says():
    found = [*defaults_of(read_config(base.get_config()))]
    assert {name for name, *_ in found} > {"dpo.beta", "search.scann.reorder"}
    assert not [name for name, default, value in found if default != value]


def test_a_setting_that_base_lacks_or_that_is_missing_is_named():
    values = base.get_config().to_dict()
    values["dpo"] |= {f"betta{n}": 0.1 for n in range(20)} | {"betta": 0.1}
    with pytest.raises(UserError, match=r"^dpo\.betta: there is no such setting"):
        read_config(values)
    values["dpo"] = base.get_config().dpo.to_dict()
    del values["generator"]["server"]["url"]
    with pytest.raises(UserError, match=r"^generator\.server\.url is missing"):
        read_config(values)
    with pytest.raises(UserError, match=r"^dpo is 3; expected a section"):
        read_config({**base.get_config().to_dict(), "dpo": 3})


def test_a_config_is_read_from_json_as_from_its_file():
    config = read_config(base.get_config())
    assert config == read_config(json.loads(base.get_config().to_json()))
    assert read_config(config) is config
    changed = with_settings(config, {"generator.server.url": "x", "seed": 3})
    assert (changed.generator.server.url, changed.seed) == ("x", 3)
    assert changed.generator.slots == config.generator.slots


@pytest.mark.parametrize(
    ("program", "config", "override", "message"),
    [
        ("train.joint", "smoke", "dpo.epochs=inf", f"dpo.epochs is inf; expected {EPOCHS}"),
        ("train.retriever", "retriever", "retriever.pooling=max", "retriever.pooling is 'max'"),
        ("train.generator", "dpo", "dpo.response_length=1", "dpo.response_length is 1"),
        ("train.plan", "smoke", "lora.targets=('(',)", "lora.targets is ('(',)"),
        ("eval.beir", "beir", "contrastive.normalize=x", "contrastive.normalize is 'x'"),
    ],
)  # fmt: skip
def test_a_program_says_so_before_it_begins(tmp_path, program, config, override, message):
    workdir = [f"--workdir={tmp_path / 'run'}"] if program != "train.plan" else []
    systems = ["--systems=bm25"] if program == "eval.beir" else []
    path = pathlib.PurePath(CONFIGS.name) / f"{config}.py"
    process = command(program, f"--config={path}", f"--config.{override}", *workdir, *systems)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert output.startswith(f"error: {message}"), output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_candidates_that_are_all_one_text_are_refused():
    config = base.get_config()
    config.candidates.update(temperatures=(0.0, 1.0), per_temperature=1)
    read_config(config)
    for temperatures, each in (((0.0,), 8), ((0.0, 0.0), 8), ((1.0,), 1)):
        config.candidates.update(temperatures=temperatures, per_temperature=each)
        with pytest.raises(UserError, match=r"^candidates\.temperatures is .*two different texts"):
            read_config(config)
    config.candidates.update(temperatures=(0.0, 1.0), per_temperature=8, top_k=1)
    with pytest.raises(UserError, match=r"^candidates\.top_k is 1; .*two different texts"):
        read_config(config)


def test_shares_of_a_softmax_want_vectors_of_unit_length():
    config = base.get_config()
    config.reward.corpus_measure = "softmax_share"
    config.contrastive.normalize = "before"
    config.reward.corpus = 0.0
    read_config(config)
    config.reward.corpus = 1.0
    with pytest.raises(UserError, match=r"^contrastive\.normalize is 'before'; expected"):
        read_config(config)
    config.reward.update(corpus=0.0, gain=1.0, gain_measure="softmax_share")
    with pytest.raises(UserError, match=r"as reward\.gain_measure is"):
        read_config(config)


def test_no_more_tokens_are_punished_than_a_text_may_have():
    config = base.get_config()
    config.candidates.max_new_tokens = 99
    read_config(config)
    config.reward.length = 1.0
    with pytest.raises(
        UserError,
        match=r"^reward\.length_cache is 100; expected at most candidates\.max_new_tokens, 99",
    ):
        read_config(config)


def test_shares_of_a_harvest_add_up():
    config = base.get_config()
    config.data.shares.generator_train = 0.9
    read_config(config)  # Those of triples are parts of what they add up to.
    config.data.kind = "pydoc"
    with pytest.raises(
        UserError, match=r"^data\.shares: its four parts add up to 1\.795; expected 1"
    ):
        read_config(config)
