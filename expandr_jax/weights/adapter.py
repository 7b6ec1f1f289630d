"""LoRA adapters in the format of the PEFT library, both ways."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from expandr_jax.errors import UserError
from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.models.lora import LoraConfig
from expandr_jax.weights.export import new_directory
from expandr_jax.weights.names import Weight, decoder_weights
from expandr_jax.weights.safetensors_file import SafetensorsFile, write_arrays
from expandr_jax.weights.source import locate
from expandr_jax.weights.tokenizer import read_json

_PREFIX = "base_model.model.model."
# Settings that change what an adapter computes, and the one value of each that is implemented.
_PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "lora_bias": False,
}


def export_adapter(
    directory: str | os.PathLike,
    adapter: Mapping[str, Any],
    lora: LoraConfig,
    config: DecoderConfig,
    base: str,
) -> None:
    """Writes a directory that peft loads on top of its base model.

    Args:
        directory: Replaced if it is there.
        adapter: The tree made by `init_lora`, trained.
        lora: The adapter's settings.
        config: The base's shape.
        base: Path or hub id of the unmerged base, in transformers' format.

    Raises:
        UserError: If the directory cannot be written.
    """
    flat = traverse_util.flatten_dict(adapter, sep="/")
    tensors, targets = {}, set()
    for path, module in _modules(config).items():
        if f"{path}/a" not in flat:
            continue
        targets.add(module.rsplit(".", 1)[-1])
        for name, letter in (("a", "A"), ("b", "B")):
            for layer, part in enumerate(np.asarray(flat[f"{path}/{name}"])):
                key = f"{_PREFIX}{module.format(layer)}.lora_{letter}.weight"
                tensors[key] = np.ascontiguousarray(part.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "inference_mode": True,
        **_PLAIN,
    }
    with new_directory(directory) as new:
        write_arrays(new / "adapter_model.safetensors", tensors)
        text = json.dumps(settings, indent=2) + "\n"
        (new / "adapter_config.json").write_text(text, encoding="utf-8")


def adapter_base(directory: Path) -> str | None:
    """What a PEFT adapter's directory names as its base; None where it holds a whole model.

    Raises:
        UserError: If it is an adapter that names none.
    """
    where = directory / "adapter_config.json"
    if not where.is_file() or (directory / "config.json").is_file():
        return None
    base = read_json(where).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{where}: base_model_name_or_path is missing: it says what to merge into")
    return base


def load_adapter(source: str, config: DecoderConfig) -> tuple[LoraConfig, dict[str, Any]]:
    """Reads a PEFT adapter.

    Args:
        source: A directory, "package:NAME/PATH" or a hub id.
        config: Shape of the model it is for.

    Returns:
        Its settings, with the exact projections as targets, and its tree, float32.

    Raises:
        UserError: If it is not a plain LoRA adapter, or does not fit the model.
    """
    directory = locate(source)
    where = directory / "adapter_config.json"
    settings = read_json(where)
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type {settings.get('peft_type')!r} is not supported; LORA is"
        )
    for key, value in _PLAIN.items():
        if settings.get(key) and settings[key] != value:
            raise UserError(f"{where}: {key}={settings[key]!r} is not supported; only {value!r} is")
    tensors = _read_tensors(directory / "adapter_model.safetensors")
    flat, rank = {}, settings["r"]
    for path, module in _modules(config).items():
        for name, letter in (("a", "A"), ("b", "B")):
            keys = [f"{module.format(i)}.lora_{letter}.weight" for i in range(config.num_layers)]
            if any(key in tensors for key in keys):
                flat[f"{path}/{name}"] = _stack(where.parent, tensors, keys, rank, name)
    if tensors or not flat:
        raise UserError(
            f"{where.parent}: tensors fit no projection: {', '.join(sorted(tensors)[:5])}"
        )
    targets = tuple(f"^{re.escape(path)}$" for path in sorted({p.rsplit("/", 1)[0] for p in flat}))
    lora = LoraConfig(rank, settings["lora_alpha"], settings.get("lora_dropout", 0.0), targets)
    return lora, traverse_util.unflatten_dict(flat, sep="/")


def _modules(config: DecoderConfig) -> dict[str, str]:
    """Projections inside layers: our path to the Hugging Face module."""
    weights: list[Weight] = decoder_weights(config, with_head=False)
    return {
        weight.path.removesuffix("/kernel"): weight.name.removesuffix(".weight")
        for weight in weights
        if weight.path.endswith("/kernel")
    }


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    # Up to three levels of wrappers come before the layers, depending on the task.
    return {re.sub(r"^.*?(?=layers\.\d+\.)", "", name): file.read(name) for name in file.entries}


def _stack(
    where: Path, tensors: dict[str, np.ndarray], keys: list[str], rank: int, name: str
) -> jnp.ndarray:
    """Takes one matrix for each layer out of `tensors`."""
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise UserError(f"{where}: tensors are missing: {', '.join(missing[:5])}")
    parts = [np.asarray(tensors.pop(key), np.float32).T for key in keys]
    for key, part in zip(keys, parts, strict=True):
        if part.shape != parts[0].shape or part.shape[-1 if name == "a" else 0] != rank:
            raise UserError(
                f"{where}: {key} has shape {part.T.shape}, which does not fit rank {rank}"
            )
        if not np.isfinite(part).all():
            raise UserError(f"{where}: {key} has NaN or infinite values")
    return jnp.asarray(np.stack(parts))
