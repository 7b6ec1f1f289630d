"""The settings that a sentence-transformers directory keeps beside the weights, both ways."""

import dataclasses
import itertools
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.models.pooling import Pooling
from expandr_jax.models.retriever import Retriever
from expandr_jax.weights.fields import Fields, path_inside, read_json, shown
from expandr_jax.weights.safetensors_file import SafetensorsFile, write_plain_safetensors

_POOLING = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
# The last is our own, which sentence-transformers refuses: it puts nothing behind texts.
_NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last", "block": "block"}
_ACTIVATIONS = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
}
_VECTOR = "sentence_embedding"
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")
_NEEDED = _ORDER[:2]
_REPEATED = ("Dense",)
_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
# The names that the Transformer's file has had; the first that is there counts.
_TRANSFORMER_FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
# What those files may say, all names that it has had; and which arguments change no vector.
_ARGUMENTS = {
    "model": ("model_kwargs", "model_args"),
    "processor": ("processor_kwargs", "tokenizer_args"),
    "config": ("config_kwargs", "config_args"),
}
_HARMLESS = (
    *("attn_implementation", "cache_dir", "device_map", "dtype", "local_files_only"),
    *("low_cpu_mem_usage", "padding_side", "revision", "token", "torch_dtype"),
    *("trust_remote_code", "use_cache", "use_fast", "use_safetensors"),
)


@dataclasses.dataclass(frozen=True)
class ModuleSettings:
    """What a directory says about turning token vectors into a text's vector.

    Attributes:
        pooling: How token vectors are joined.
        normalize: Whether vectors are scaled to length one.
        max_length: In tokens, or None if not said.
        query_prompt: Put before queries.
        document_prompt: Put before documents.
        dense: Each layer after pooling: its activation, and the folder of its weights.
    """

    pooling: Pooling
    normalize: bool
    max_length: int | None = None
    query_prompt: str = ""
    document_prompt: str = ""
    dense: tuple[tuple[str, Path], ...] = ()


def read_settings(directory: Path, document_prompt: str | None = None) -> ModuleSettings | None:
    """Reads modules.json and the files it points to.

    Args:
        directory: A model directory.
        document_prompt: What is put before documents, whatever the files say; None: as they say.

    Returns:
        The settings, or None where there is no modules.json.

    Raises:
        UserError: If the modules are others than Transformer, Pooling, Dense and Normalize, or in
            another order, or one is set to do something that is not implemented.
    """
    listing = directory / "modules.json"
    if not listing.is_file():
        return None
    every = read_modules(listing)
    modules = {kind: paths[0] for kind, paths in every.items() if paths}
    more = Fields.read(directory / "config_sentence_transformers.json", optional=True)
    if "truncate_dim" in more:
        # Cut after they are brought to unit length, vectors would have no length that fits a score.
        raise UserError(
            f"{more.where}: truncate_dim={shown(more.values['truncate_dim'])} is not supported; "
            "null has vectors of the whole width"
        )
    more.strict(
        *("__version__", "default_prompt_name", "prompts", "requirements", "similarity_fn_name"),
        model_type="SentenceTransformer",
    )
    return ModuleSettings(
        pooling=_pooling(modules["Pooling"] / "config.json"),
        normalize=_normalizes(more, modules.get("Normalize")),
        max_length=transformer_length(
            modules["Transformer"], "feature-extraction", "last_hidden_state", "token_embeddings"
        ),
        query_prompt=prompt_of(more, "query"),
        document_prompt=prompt_of(more, "document") if document_prompt is None else document_prompt,
        dense=tuple((_dense_activation(path), path) for path in every["Dense"]),
    )


def module_folders(listing: Path) -> list[str]:
    """The folders that modules.json names, whatever the modules; none where there is no file."""
    entries = read_json(listing, [])
    names = [entry.get("path") for entry in entries if isinstance(entry, dict)]
    return [str(name) for name in names if name and path_inside(listing.parent, name, str(listing))]


def read_modules(
    listing: Path,
    order: Sequence[str] = _ORDER,
    needed: Sequence[str] = _NEEDED,
    older: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, list[Path]]:
    """The folders of the modules that modules.json lists, by their kinds, all of `order`.

    They come in this order; there may be several of `_REPEATED`, one of the others. `older` are
    names that kinds have had.
    """
    entries = read_json(listing)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{listing}: expected a list of JSON objects, one for each module")
    entries = [Fields(entry, str(listing)) for entry in entries]
    kinds = [entry.text("type") for entry in entries]
    # A model's own code may call its class Transformer, too, and compute something else by it.
    kinds = [k.rsplit(".", 1)[-1] if k.startswith("sentence_transformers.") else k for k in kinds]
    kinds = [older.get(kind, kind) for kind in kinds]
    counts = {kind: kinds.count(kind) if kind in _REPEATED else 1 for kind in order}
    if kinds != [k for k in order if k in {*kinds, *needed} for _ in range(counts[k])]:
        optional = " and ".join(kind for kind in order if kind not in needed)
        raise UserError(
            f"{listing}: modules are {shown(', '.join(kinds))}; supported: {', '.join(needed)}"
            + (optional and f", then, if wanted, {optional}")
        )
    names = [entry.text("path") for entry in entries]
    paths = [path_inside(listing.parent, name, str(listing)) for name in names]
    if paths[0] != listing.parent:
        raise UserError(
            f"{listing}: its Transformer is in {shown(names[0])}; only one in the model's own "
            "directory is supported: load and save such a model with sentence-transformers first"
        )
    found = list(zip(kinds, paths, strict=True))
    return {kind: [path for own, path in found if own == kind] for kind in order}


def transformer_length(folder: Path, task: str, method_output: str, output: str) -> int | None:
    """The longest input that the Transformer's own file allows; what else it says is refused.

    Args:
        folder: The Transformer's.
        task: What it is loaded for, `transformer_task` in its file.
        method_output: What of the model's output it takes.
        output: What it calls that.
    """
    paths = [folder / name for name in _TRANSFORMER_FILES if (folder / name).is_file()]
    if not paths:
        return None
    config = Fields.read(paths[0])
    # With "message", texts would be put into the tokenizer's chat template.
    config.section("modality_config").strict("text")
    config.section("modality_config").section("text").strict(
        method="forward", method_output_name=method_output
    )
    config.strict(
        *("max_seq_length", "modality_config", "unpad_inputs"),
        *itertools.chain(*_ARGUMENTS.values()),
        do_lower_case=False,
        document_length=None,
        module_output_name=output,
        processing_kwargs={},
        query_expansion=None,
        query_length=None,
        transformer_task=task,
    )
    length = config.count("max_seq_length", None)
    for new, old in _ARGUMENTS.values():
        if new in config and old in config:
            raise UserError(f"{config.where}: it has {new} and {old}, one thing by two names")
    for name in itertools.chain(*_ARGUMENTS.values()):
        arguments = config.section(name)
        if name in _ARGUMENTS["processor"]:
            length = arguments.count("model_max_length", length)
            arguments.strict("model_max_length", *_HARMLESS)
        else:
            arguments.strict(*_HARMLESS)
    return length


def _normalizes(config: Fields, module: Path | None) -> bool:
    """Whether vectors are to have length one, so that inner products rank as the model's scores.

    Cosines, which are the default, are the inner products of such vectors; so are the rankings by
    their distances. Where there is no Normalize module, the length of vectors counts for all else.
    """
    similarity = config.choice("similarity_fn_name", _SIMILARITIES, "cosine")
    if module is not None:
        if (path := module / "config.json").is_file():
            Fields.read(path).strict(module_input_name=_VECTOR, module_output_name=_VECTOR)
    elif similarity == "dot":
        return False
    if similarity == "manhattan" or (similarity == "euclidean" and module is None):
        raise UserError(
            f"{config.where}: similarity_fn_name {similarity!r} is not supported: no inner product "
            "ranks as it does; supported: cosine, dot and, after a Normalize module, euclidean"
        )
    return True


def _dense_activation(folder: Path) -> str:
    config = Fields.read(folder / "config.json")
    default = "torch.nn.modules.activation.Tanh"
    name = config.choice("activation_function", tuple(_ACTIVATIONS), default)
    config.strict(
        *("activation_function", "bias", "in_features", "out_features"),
        module_input_name=_VECTOR,
        module_output_name=_VECTOR,
        use_residual=False,
    )
    return _ACTIVATIONS[name]


def read_dense(folder: Path, width: int) -> dict[str, np.ndarray]:
    """The kernel [width, out] and, where there is one, the bias of a Dense module.

    Args:
        folder: Holds model.safetensors.
        width: Length of the vectors before it.

    Raises:
        UserError: If the file or a tensor is missing, or does not fit.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; pytorch_model.bin, a pickle, can run code when read and is "
            "refused: load and save such a model with sentence-transformers first"
        )
    file = SafetensorsFile(path)
    arrays = {name: file.read(name) for name in file.entries}
    kernel, bias = arrays.pop("linear.weight", None), arrays.pop("linear.bias", None)
    config = Fields.read(folder / "config.json")
    if kernel is None or arrays or kernel.ndim != 2 or kernel.shape[1] != width:
        raise UserError(
            f"{path}: expected linear.weight of width {width} and perhaps linear.bias, found "
            + ", ".join(f"{name} {entry.shape}" for name, entry in file.entries.items())
        )
    if bias is not None and bias.shape != kernel.shape[:1]:
        raise UserError(f"{path}: linear.bias {bias.shape} does not fit {kernel.shape}")
    for name, value in zip(("out_features", "in_features"), kernel.shape, strict=True):
        if config.count(name, value) != value:
            raise config.refuse(name, f"{value}, as linear.weight has it")
    if config.flag("bias", True) != (bias is not None):
        raise config.refuse("bias", f"{str(bias is not None).lower()}, as the tensors have it")
    params = {"kernel": np.ascontiguousarray(kernel.T)}
    if bias is not None:
        params["bias"] = bias
    if not all(jnp.issubdtype(value.dtype, jnp.floating) for value in params.values()):
        raise UserError(f"{path}: its tensors are not of a floating type")
    with np.errstate(over="ignore"):
        params = {name: value.astype(np.float32) for name, value in params.items()}
    if not all(np.isfinite(value).all() for value in params.values()):
        raise UserError(f"{path}: it has NaN or infinite values")
    return params


def write_dense(folder: Path, params: Mapping[str, Any], activation: str) -> None:
    """Writes a Dense module: "kernel" [in, out], perhaps "bias", and its activation."""
    arrays = {"linear.weight": np.ascontiguousarray(np.asarray(params["kernel"]).T)}
    if "bias" in params:
        arrays["linear.bias"] = np.asarray(params["bias"])
    width_out, width_in = arrays["linear.weight"].shape
    config = {
        "in_features": width_in,
        "out_features": width_out,
        "bias": "bias" in params,
        "activation_function": next(k for k, v in _ACTIVATIONS.items() if v == activation),
    }
    folder.mkdir()
    write_plain_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _pooling(path: Path) -> Pooling:
    config = Fields.read(path)
    modes = [key for key in config.values if key.startswith("pooling_mode_")]
    config.strict(
        *("embedding_dimension", "pooling_mode", "word_embedding_dimension", *modes),
        include_prompt=True,
    )
    if isinstance(config.values.get("pooling_mode"), list):
        kinds = config.items("pooling_mode", str)
    elif "pooling_mode" in config:
        kinds = [config.text("pooling_mode")]
    else:
        kinds = [_POOLING.get(key, key) for key in modes if config.flag(key, False)] or ["mean"]
        kinds = [{"last": "lasttoken"}.get(kind, kind) for kind in kinds]
    if len(kinds) != 1 or kinds[0] not in _NAMES:
        raise UserError(
            f"{path}: pooling {shown('+'.join(kinds))} is not supported; "
            "supported: mean, cls, lasttoken"
        )
    return _NAMES[kinds[0]]


def prompt_of(config: Fields, name: str) -> str:
    """What encode_query and encode_document put before a text.

    They ask for the prompt of that name and never fall back on the default one: a name that is not
    there means none. So "passage" and "corpus", which the documentation names beside "document",
    have no effect since version 5; what the file's author wanted by them is not for us to guess.
    """
    prompts = config.section("prompts")
    default = config.text("default_prompt_name", None)
    if default is not None and default not in {"query", "document", *prompts.values}:
        raise config.refuse("default_prompt_name", "the name of one of its prompts")
    others = [other for other in ("passage", "corpus") if prompts.text(other, "")]
    if name == "document" and name not in prompts and others:
        raise UserError(
            f"{config.where}: its prompts name {others[0]!r} but no 'document', and so "
            "sentence-transformers puts none before documents: rename it, or remove it"
        )
    return prompts.text(name, "")


def write_settings(directory: Path, retriever: Retriever) -> list[Path]:
    """Writes modules.json and its kin, in the form that versions 2 to 6 read.

    Args:
        directory: Where the Transformer's own files are.
        retriever: What to write.

    Returns:
        The folders of its dense layers, which `write_dense` makes.
    """
    wanted = {"Dense": len(retriever.dense), "Normalize": int(retriever.normalize)}
    modules = [kind for kind in _ORDER for _ in range(wanted.get(kind, 1))]
    listing = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(modules)
    ]
    pooling: dict[str, Any] = {"word_embedding_dimension": retriever.module.config.hidden_size}
    pooling |= {key: kind == retriever.pooling for key, kind in _POOLING.items()}
    if retriever.pooling == "block":
        pooling["pooling_mode"] = "block"
    prompts = {"query": retriever.query_prompt, "document": retriever.document_prompt}
    files = {
        "modules.json": listing,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {
            "max_seq_length": retriever.max_length,
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if retriever.normalize else "dot",
        },
    }
    if retriever.normalize:
        (directory / listing[-1]["path"]).mkdir()
    (directory / "1_Pooling").mkdir()
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [directory / entry["path"] for entry in listing if entry["type"].endswith("Dense")]
