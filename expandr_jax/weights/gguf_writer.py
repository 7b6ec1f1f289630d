"""Writes a generator as one GGUF file, for llama.cpp: `gguf` reads it back.

The gguf package writes what comes before the tensors; these are written a part at a time, so that
of a model which stays in its files one tensor is in memory.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.records import replacing
from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.models.generator import Generator
from expandr_jax.models.rope import RopeScaling, scale_frequencies
from expandr_jax.weights.families import family_of
from expandr_jax.weights.families.family import GgufForm
from expandr_jax.weights.gguf import LAYER_TENSORS, OTHER_TENSORS, ROPE_FACTORS, ROTARY
from expandr_jax.weights.gguf_vocabulary import vocabulary
from expandr_jax.weights.safetensors_file import Tensor
from expandr_jax.weights.store import named_tensors

_Kind = gguf.GGMLQuantizationType
# --gguf_type -> how tables are stored, and llama.cpp's number of such a file.
GGUF_TYPES = {"f16": (_Kind.F16, 1), "q8_0": (_Kind.Q8_0, 7)}
# How many times the largest f16 a number may be.
_LARGEST = {_Kind.F16: np.float32(1), _Kind.Q8_0: np.float32(127)}
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_TYPES = {
    bool: gguf.GGUFValueType.BOOL,
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
    list: gguf.GGUFValueType.ARRAY,
}


def export_gguf(path: str | os.PathLike, generator: Generator, params: Any, kind: str) -> None:
    """Writes the model, its tokenizer and its chat template.

    Args:
        path: The file; one that is there is replaced.
        generator: A decoder of a family that llama.cpp has.
        params: Its parameters, adapters merged; they may stay in a model's files.
        kind: One of GGUF_TYPES, of the tables. Norms and biases are float32, and rows that no
            block of q8_0 divides are f16, as in llama.cpp's own files.

    Raises:
        UserError: llama.cpp cannot compute the model or cut its texts, a number is beyond the type,
            or the file cannot be written.
    """
    path = Path(path)
    try:
        form = _form(generator)
        metadata, tensors = _metadata(generator, form, kind), _tensors(generator, form, params)
        kinds = {name: _stored_as(tensor, kind) for name, tensor in tensors.items()}
        metadata["general.name"] = path.stem
        with replacing(path) as file:
            _write_header(Path(file.name), metadata, tensors, kinds)
            file.seek(0, os.SEEK_END)
            for name, tensor in tensors.items():
                _pad(file)
                for part in tensor.parts():
                    file.write(_encoded(name, part, kinds[name]).view(np.uint8).data)
            _pad(file)
    except UserError as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}: no GGUF can be written: "
        raise UserError(f"{prefix}{error}") from None


def _form(generator: Generator) -> GgufForm:
    """How llama.cpp has a generator, which it must be able to compute."""
    config, kind = generator.module.config, generator.files.model_type
    form = family_of(generator.module).gguf.get(kind)
    if form is None or config.quantized:
        kept = f" in {config.quantized}" if config.quantized else ""
        raise UserError(f"llama.cpp's form of {kind}{kept} is not known")
    architecture, scaling = form.architecture, config.rope_scaling
    if config.activation != form.activation:
        raise UserError(f"llama.cpp has no {config.activation} in {architecture}")
    if config.sliding_window is not None and form.write is None:
        raise UserError(f"llama.cpp has no sliding window in {architecture}")
    if scaling is not None and scaling.kind != "linear" and not form.stretches:
        raise UserError(f"llama.cpp stretches no positions of {architecture} as Llama 3.1 does")
    return form


def _metadata(generator: Generator, form: GgufForm, kind: str) -> dict[str, Any]:
    """All values by key."""
    config, architecture = generator.module.config, form.architecture
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.mlp_dim,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        **({} if form.write is None else form.write(config)),
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    quantized = {"general.quantization_version": 2} if kind == "q8_0" else {}
    return {
        "general.type": "model",
        "general.file_type": GGUF_TYPES[kind][1],
        **quantized,
        **vocabulary(generator, architecture),
        **{f"{architecture}.{name}": value for name, value in own.items()},
    }


def _tensors(generator: Generator, form: GgufForm, params: Any) -> dict[str, Tensor]:
    """All tensors by llama.cpp's names and in its layout, in float32, none of which is made yet."""
    config = generator.module.config
    tables = {hf: name for name, hf in (OTHER_TENSORS | LAYER_TENSORS | form.tensors).items()}
    found = {}
    for name, tensor in named_tensors(
        params,
        family_of(generator.module).weights(config, True),
        "model.",
        lambda *_: np.dtype(np.float32),
    ).items():
        found[_name(name, tables)] = _converted(name, tensor, config, form)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        divisors = _divisors(config, config.rope_scaling)
        found[ROPE_FACTORS] = Tensor(divisors.dtype, divisors.shape, lambda: [divisors])
    return found


def _name(name: str, tables: Mapping[str, str]) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, suffix = name.rpartition(".")
    if stem in tables:
        return f"{tables[stem]}.{suffix}"
    layer, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{tables[inner]}.{suffix}"


def _converted(name: str, tensor: Tensor, config: DecoderConfig, form: GgufForm) -> Tensor:
    """A tensor with the numbers that llama.cpp has in its place."""

    def shifted() -> Iterator[np.ndarray]:
        for part in tensor.parts():
            yield part + 1  # Its norms scale by w, and not by 1 + w.

    def interleaved() -> Iterator[np.ndarray]:
        whole = np.concatenate(list(tensor.parts()))
        halves = whole.reshape(-1, 2, config.head_dim // 2, whole.shape[-1])
        yield halves.swapaxes(1, 2).reshape(whole.shape)  # What rotates together stands together.

    if form.norm_plus_one and name.endswith("norm.weight"):
        return Tensor(tensor.dtype, tensor.shape, shifted)
    if form.interleaved and ROTARY.search(name):
        return Tensor(tensor.dtype, tensor.shape, interleaved)
    return tensor


def _divisors(config: DecoderConfig, scaling: RopeScaling) -> np.ndarray:
    """What Llama 3.1's stretching divides the frequencies by."""
    plain = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    return np.asarray(plain / np.asarray(scale_frequencies(plain, scaling)), np.float32)


def _stored_as(tensor: Tensor, kind: str) -> gguf.GGMLQuantizationType:
    if len(tensor.shape) == 1:
        return _Kind.F32
    chosen, _ = GGUF_TYPES[kind]
    return chosen if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else _Kind.F16


def _encoded(name: str, part: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Some rows of a tensor as the file has them."""
    rows = np.ascontiguousarray(part, np.float32)
    with np.errstate(over="ignore"):
        # The largest number of a block of q8_0 is 127 times its scale, which is f16.
        held = rows if kind == _Kind.F32 else (rows / _LARGEST[kind]).astype(np.float16)
    if not np.isfinite(held).all():
        hint = "; q8_0 may" if kind == _Kind.F16 and np.isfinite(rows).all() else ""
        raise UserError(f"tensor {name} has a number that {kind.name.lower()} cannot hold{hint}")
    return (gguf.quantize(rows, kind) if kind == _Kind.Q8_0 else held).reshape(-1)


def _write_header(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    kinds: Mapping[str, gguf.GGMLQuantizationType],
) -> None:
    """Writes all that comes before the first tensor."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    for key, value in metadata.items():
        if key != "general.architecture":  # The writer has said it.
            writer.add_key_value(key, value, _TYPES[type(value)])
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        num_bytes = math.prod(tensor.shape) // block * size
        shape = tensor.shape
        writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _pad(file: Any) -> None:
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
