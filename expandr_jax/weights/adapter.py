"""LoRA adapters in the format of the PEFT library, both ways."""

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from expandr_jax.errors import UserError
from expandr_jax.models.lora import LoraConfig
from expandr_jax.models.stack import TransformerConfig
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.weights.export import new_directory
from expandr_jax.weights.families import family_of_config
from expandr_jax.weights.fields import Fields, shown
from expandr_jax.weights.load import leaf_shapes
from expandr_jax.weights.names import Weight, hf_name
from expandr_jax.weights.safetensors_file import SafetensorsFile, write_plain_safetensors
from expandr_jax.weights.source import locate

_PREFIX = "base_model.model."
# Settings that are read here; those of how it was trained or begun, or that say again what its
# tensors say; and those that change what it computes, with the one value that is implemented.
_READ = (
    "base_model_name_or_path", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r",
    "revision",
)  # fmt: skip
_UNREAD = (
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config",
    "target_modules", "task_type", "velora_config",
)  # fmt: skip
_PLAIN = {
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "lora_bias": False,
}
# Beginnings under which the base's own kernels stay what they are.
_INITS = (None, True, False, "eva", "gaussian", "mica", "orthogonal")


def export_adapter(
    directory: str | os.PathLike,
    adapter: Mapping[str, Any],
    lora: LoraConfig,
    config: TransformerConfig,
    base: str,
    *,
    generates: bool = True,
) -> None:
    """Writes a directory that peft loads on top of its base model.

    Args:
        directory: Replaced if it is there.
        adapter: The tree made by `init_lora`, trained.
        lora: The adapter's settings.
        config: The base's shape.
        base: Path or hub id of the unmerged base, in transformers' format.
        generates: The base is a language model with its head; else an encoder without one.

    Raises:
        UserError: If the directory cannot be written.
    """
    flat = traverse_util.flatten_dict(adapter, sep="/")
    prefix = _PREFIX + "model." * generates
    tensors, targets = {}, set()
    for path, weight in _kernels(config).items():
        if f"{path}/a" not in flat:
            continue
        for name, letter in (("a", "A"), ("b", "B")):
            for layer, part in enumerate(np.asarray(flat[f"{path}/{name}"])):
                module = _module(weight, layer)
                # An encoder's are named in full: the ends of BERT's are those of others, too.
                targets.add(module.rsplit(".", 1)[-1] if generates else module)
                tensors[f"{prefix}{module}.lora_{letter}.weight"] = np.ascontiguousarray(part.T)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "inference_mode": True,
        **_PLAIN,
    }
    with new_directory(directory) as new:
        write_plain_safetensors(new / "adapter_model.safetensors", tensors)
        # In ASCII: peft reads it in the locale's encoding.
        text = json.dumps(settings, indent=2) + "\n"
        (new / "adapter_config.json").write_text(text, encoding="utf-8")


def adapter_base(directory: Path) -> tuple[str, str | None] | None:
    """The base that a PEFT adapter's directory names, and its revision on the hub if it says one.

    None where the directory holds a whole model.

    Raises:
        UserError: If it is an adapter that names none, or holds a whole model, too.
    """
    where = directory / "adapter_config.json"
    if not where.is_file():
        return None
    for name in ("model.safetensors", "model.safetensors.index.json"):
        if (directory / name).is_file():
            raise UserError(
                f"{directory}: it holds a model ({name}) and an adapter ({where.name}): move one "
                "of them to a directory of its own, so that it is clear what to load"
            )
    settings = Fields.read(where)
    if not settings.values.get("base_model_name_or_path"):
        raise UserError(f"{where}: base_model_name_or_path is missing: it says what to merge into")
    return settings.text("base_model_name_or_path"), settings.text("revision", None)


def load_adapter(source: str, config: TransformerConfig) -> tuple[LoraConfig, dict[str, Any]]:
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
    settings = Fields.read(where)
    settings.choice("peft_type", ("LORA",))
    # An empty value of these is none.
    given = {name: value for name, value in settings.values.items() if value}
    Fields(given, str(where)).strict(*_READ, *_UNREAD, **_PLAIN)
    init = settings.values.get("init_lora_weights")
    if init not in _INITS:
        raise UserError(
            f"{where}: init_lora_weights={shown(init)} changes the base too, "
            "which this adapter does not hold: save it with peft's "
            "path_initial_model_for_weight_conversion, which makes a plain adapter of it"
        )
    rank, alpha = settings.count("r"), settings.number("lora_alpha")
    dropout = settings.rate("lora_dropout", 0.0)
    tensors = _read_tensors(directory / "adapter_model.safetensors")
    shapes, flat = leaf_shapes(family_of_config(config).module(config)), {}
    kernels = {path: (w, shapes[f"{path}/kernel"]) for path, w in _kernels(config).items()}
    known = {_module(weight, i) for weight, shape in kernels.values() for i in range(shape[0])}
    tensors = {_known_name(name, known): tensor for name, tensor in tensors.items()}
    for path, (weight, (layers, width_in, width_out)) in kernels.items():
        pairs = {"A": (rank, width_in), "B": (width_out, rank)}
        keys = {
            letter: [f"{_module(weight, i)}.lora_{letter}.weight" for i in range(layers)]
            for letter in pairs
        }
        if any(key in tensors for names in keys.values() for key in names):
            for letter, shape in pairs.items():
                flat[f"{path}/{letter.lower()}"] = _stack(
                    where.parent, tensors, keys[letter], shape, rank
                )
    if tensors or not flat:
        raise UserError(
            f"{where.parent}: tensors fit no projection: {', '.join(sorted(tensors)[:5])}"
        )
    targets = tuple(f"^{re.escape(path)}$" for path in sorted({p.rsplit("/", 1)[0] for p in flat}))
    lora = LoraConfig(rank, alpha, dropout, targets)
    return lora, traverse_util.unflatten_dict(flat, sep="/")


def _kernels(config: TransformerConfig) -> dict[str, Weight]:
    """Our paths of the projections inside layers, with their weights in the family's table."""
    weights = family_of_config(config).weights(config, False)
    kernels = [weight for weight in weights if weight.path.endswith("/kernel") and weight.stacked]
    return {weight.path.removesuffix("/kernel"): weight for weight in kernels}


def _module(weight: Weight, layer: int) -> str:
    """The Hugging Face module whose weight is a layer's of a stack."""
    return hf_name(weight, layer, "").removesuffix(".weight")


def _known_name(name: str, modules: Collection[str]) -> str:
    """A tensor's name from where its module's begins; as it is, where that is not known.

    Up to three levels of wrappers come before the module, depending on the task.
    """
    parts = name.split(".")
    ends = (".".join(parts[first:]) for first in range(len(parts)))
    return next((end for end in ends if end.rsplit(".", 2)[0] in modules), name)


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; adapter_model.bin, a pickle, can run code when read and is "
            "refused: load and save such an adapter with peft first"
        )
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.entries}


def _stack(
    where: Path, tensors: dict[str, np.ndarray], keys: list[str], shape: tuple[int, int], rank: int
) -> jnp.ndarray:
    """Takes one matrix for each layer, of that shape in the file, out of `tensors`."""
    missing = [key for key in keys if key not in tensors]
    if missing:
        raise UserError(f"{where}: tensors are missing: {', '.join(missing[:5])}")
    parts = [np.asarray(tensors.pop(key), np.float32) for key in keys]
    for key, part in zip(keys, parts, strict=True):
        if part.shape != shape:
            raise UserError(
                f"{where}: {key} has shape {part.shape}; its base and rank {rank} make it {shape}"
            )
        if not np.isfinite(part).all():
            raise UserError(f"{where}: {key} has NaN or infinite values")
    return jnp.asarray(np.stack([part.T for part in parts]))


def base_name(workdir: str | os.PathLike, source: str, name: str = "base") -> str:
    """What the adapter calls its base: the source, or where `--format=NAME` belongs if peft cannot
    load the source itself."""
    alien = source.startswith("package:") or source.endswith(".gguf")
    # An adapter on an adapter is more than peft's files can say.
    if alien or adapter_base(locate(source)) is not None:
        # A run in a bucket has no path to make absolute.
        run = workdir if is_bucket(workdir) else Path(workdir).absolute()
        return f"{run}/export/{name}"
    path = Path(source).expanduser()
    # A hub id stays one; a path must be the same wherever peft runs.
    return str(path.absolute()) if path.is_dir() else source
