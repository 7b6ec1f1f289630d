"""What older runs wrote, as the present code has it.

config.json has a format number: those without one were written before there were any. A run goes on
where its config, translated, is the present one; its checkpoints where the identities of old hold.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from expandr_jax.errors import UserError

FORMAT = 1

# Setting that older runs did not have -> the value that means what they did. Most are what is the
# default today, and are written out all the same: when a default changes, they must not, since runs
# go on as they began, and checkpoints are told apart by what differs from these.
ABSENT: dict[str, Any] = {
    **{
        f"{section}.{name}": value
        for section in ("expansion", "candidates", "answer")
        for name, value in (("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0))
    },
    "expansion.combine": "mean",
    "step_b": "dpo",
    "warm_start": "",
    "data.md5": "",
    "demonstrations": {"prompts": 0, "examples": 4, "draws": 16, "queries": 50},
    "dpo.reference": "base",
    "dpo.gamma": 0.5,
    "grpo": {
        "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_new_tokens": 512,
        "loss": "grpo", "advantage": "", "steps": 300, "queries": 16, "samples": 8,
        "temperature": 1.0, "resample": 0, "mask_cut": False, "minibatches": 1, "passes": 1,
        "accumulation": 1, "learning_rate": 1e-5, "warmup_steps": 0, "clip_norm": 1.0,
        "clip_low": None, "clip_high": None, "kl_weight": 0.0, "kl_unbiased": False,
        "entropy_weight": 0.0, "importance_cap": 0.0, "chunk": 256, "save_every": 10,
        "watch_kl": 1.0, "watch_entropy": [0.1, 3.0], "watch_repetitive": 0.5, "watch_reward": 1.0,
        "watch_steps": 10, "on_collapse": "stop",
    },
    "grpo.documents": 0,
    "grpo.document_prompt": "d2e",
    "grpo.document_weights": [0.2, 0.1],
    "distill": {
        "epochs": 0.0, "train_queries": 0, "documents": 4096, "queries_per_document": 1,
        "batch_size": 32, "accumulation": 1, "learning_rate": 5e-5, "warmup_steps": 0,
        "weight_decay": 0.0, "clip_norm": 1.0, "cosine_weight": 1.0, "kl_weight": 0.0,
        "temperature": 0.05, "depth": 16, "control": False, "eval_every": 0, "save_every": 100,
    },
    "distill.samples": [],
    "figret": {"rank": 0, "queries": 1024},
    "contrastive.curriculum": False,
    "llara": {"epochs": 0.0, "passage_words": 32, "pairs": 100_000},
    "contrastive.flops_query_weight": 0.0,
    "contrastive.flops_document_weight": 0.0,
    "contrastive.query_likelihood_weight": 0.0,
    "contrastive.query_likelihood_mask": True,
    "contrastive.query_likelihood_corruption": 0.6,
    "contrastive.lora": {"rank": 0, "alpha": 32.0, "dropout": 0.0, "targets": ["_proj$"]},
    "retriever.weights": "float32",
    "retriever.query_length": 0,
    "retriever.bidirectional": False,
    "retriever.end_token": False,
    "retriever.query_prompt": None,
    "retriever.document_prompt": None,
    "generator.thinking": None,
    "generator.today": "",
    "reward.gain": 0.0,
    "reward.gain_measure": "ndcg",
    "reward.search": "dense",
    "reward.length": 0.0,
    "reward.length_cache": 100,
    "reward.format": 0.0,
    "reward.format_pattern": ".+",
    "reward.functions": [],
    "reward.function_weights": [],
    "reward.function_seconds": 600.0,
    "mesh.workers": 0,
    "evaluation.fusion_steps": 0,
    "evaluation.rerank.depths": [],
    "reranker": {
        "source": "", "max_length": 256, "compute_dtype": "float32", "remat": "dots",
        "loss": "listwise", "negatives": 4, "dropout": False, "epochs": 1.0, "batch_size": 16,
        "accumulation": 1, "learning_rate": 2e-5, "warmup_steps": 0, "weight_decay": 0.0,
        "clip_norm": 1.0, "eval_every": 100, "patience": 0, "save_every": 100,
    },
    "evaluation.splade": {"source": "", "max_length": 512},
    "evaluation.rerank": {
        "source": "", "depth": 100, "depths": [], "max_length": 512, "rows": 32,
    },
    "evaluation.listwise": {
        "depth": 20, "depths": [], "window": 10, "stride": 5, "passage_tokens": 100,
    },
    # Older runs searched by the index, whatever it missed; what is left of them is exact.
    "search.evaluation": "exact",
    "search.exact": {"block_rows": 8192, "query_rows": 1024, "resident_mib": 512},
    "search.exact.resident_mib": 512,
    "search.scann": {
        "method": "auto", "ah_from": 20_000, "tree_from": 100_000, "leaves": None,
        "leaves_to_search": None, "tree_sample": 100_000, "tree_iterations": 12, "soar": None,
        "dimensions_per_block": 2, "anisotropic_threshold": 0.2, "ah_sample": 100_000,
        "ah_iterations": 10, "reorder": 400, "storage": "float32",
    },
}  # fmt: skip
# Those of them whose default is another: a run that began without keeps to the old.
KEPT = ("evaluation.fusion_steps",)
# Strategies of runs without a format of which a template left nothing: q2d asks it alone, as they
# did. The one is no strategy any more, the other asks for a text before it.
REPLACED = ("q2a", "csqe")
# Setting -> its present name.
RENAMED: dict[str, str] = {"reward.gain_search": "reward.search"}
# Those of `ABSENT` and `RENAMED` that identities have all the same, by their present names: older
# than the first checkpoints that are told apart by their section.
IN_IDENTITIES = frozenset(
    f"reward.{name}"
    for name in (
        "gain", "gain_measure", "search", "length", "length_cache", "format", "format_pattern",
        "functions", "function_weights", "function_seconds",
    )
)  # fmt: skip


def translated(record: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a config.json, with the settings that there are today.

    Raises:
        KeyError, TypeError, AttributeError: It is no run's record.
        UserError: Newer code wrote it.
    """
    if record.get("format", 0) > FORMAT:
        raise UserError(
            f"it has format {record['format']}, and this version reads up to {FORMAT}; "
            "use the version that wrote it"
        )
    config = json.loads(json.dumps(record["config"]))
    section, name = find_setting(config, "expansion.strategy")
    if "format" not in record and section.get("template") and section.get(name) in REPLACED:
        section[name] = "q2d"
    reward = config.get("reward", {})
    if "gain_search" in reward and (reward["corpus"] > 0 or not reward["gain"] > 0):
        # It was of `gain` alone: `corpus` was searched by vectors, whatever it said.
        reward["gain_search"] = "dense"
    for old, new in RENAMED.items():
        section, name = find_setting(config, old)
        if name in section:
            value = section.pop(name)
            section, name = find_setting(config, new)
            section[name] = value
    section, name = find_setting(config, "dpo.loss")
    if section.get(name) == "reward-sft":
        config["step_b"], section[name] = "reward-sft", "sigmoid"
    for setting, value in ABSENT.items():
        section, name = find_setting(config, setting)
        section.setdefault(name, value)
    return config


def check_goes_on(where: str, record: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that no present settings mean, though its models can be used."""
    reward = record["config"].get("reward", {})
    other = reward.get("gain_search", "dense")
    if other != "dense" and reward["gain"] > 0 and reward["corpus"] > 0:
        raise UserError(
            f"{where}: searched by {other} for reward.gain and by vectors for reward.corpus, where "
            "reward.search is one for both; go on with the version that wrote it, or use a new "
            "--workdir"
        )


def kept_as_before(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `KEPT` that a run's own record of its config lacks, with what that means."""
    found = {setting: find_setting(config, setting) for setting in KEPT}
    return {
        setting: ABSENT[setting]
        for setting, (section, name) in found.items()
        if section and name not in section
    }


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """`translated` of a run's config.json; UserError if there is none, or it is no run's."""
    try:
        with open(path, encoding="utf-8") as file:
            return translated(json.load(file))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"{path}: not a run's config; expected the workdir of a training run"
        ) from None


def identity_of(section: str, settings: Any) -> dict[str, Any]:
    """The settings of a section that checkpoints are told apart by, as those of older runs were.

    Settings that have come since are left out where they mean the old behaviour.

    Args:
        section: Its name in the config.
        settings: The dataclass that it was read into.
    """
    values = _without_absent(section, json.loads(json.dumps(dataclasses.asdict(settings))))
    for old, new in RENAMED.items():
        inside, _, name = new.rpartition(".")
        if inside == section and name in values and new not in IN_IDENTITIES:
            values[old.rpartition(".")[2]] = values.pop(name)
    return values


def _without_absent(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a section, and those within it, have beside the values of `ABSENT`."""
    left = {}
    for name, value in values.items():
        setting = f"{section}.{name}"
        absent = ABSENT.get(setting, ...)
        if isinstance(value, dict):
            value = _without_absent(setting, value)
            absent = _without_absent(setting, absent) if isinstance(absent, dict) else absent
        if value != absent or setting in IN_IDENTITIES:
            left[name] = value
    return left


def find_setting(config: dict[str, Any], setting: str) -> tuple[dict[str, Any], str]:
    """The section that a setting lies in, an empty one if there is none, and its name there."""
    *sections, name = setting.split(".")
    for section in sections:
        config = config.get(section, {})
    return config, name
