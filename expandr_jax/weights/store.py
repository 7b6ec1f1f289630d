"""Writes parameter trees as safetensors files, a part of a tensor at a time.

What is resident beyond the parameters themselves is one tensor of one layer.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from huggingface_hub import split_state_dict_into_shards_factory

from expandr_jax.files.records import write_json
from expandr_jax.weights.names import Weight, hf_name
from expandr_jax.weights.safetensors_file import Tensor, write_safetensors

_PART_BYTES = 64 * 2**20


def _rows(leaf: jax.Array, layer: int | None, transpose: bool) -> Iterator[np.ndarray]:
    """The rows of one tensor in the Hugging Face layout, fetched when they are asked for."""
    array = np.asarray(leaf if layer is None else leaf[layer])
    array = array.T if transpose else array
    step = max(1, _PART_BYTES // (array.itemsize * math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        yield array[start : start + step]


def named_tensors(
    params: Mapping[str, Any],
    weights: Sequence[Weight],
    prefix: str,
    dtype_of: Callable[[str, np.dtype], np.dtype],
    *,
    with_copies: bool = False,
) -> dict[str, Tensor]:
    """Undoes the loading: parameters to tensors by name, none of which is made yet.

    Args:
        params: Parameter tree.
        weights: The model's table.
        prefix: Put before every name but the head's.
        dtype_of: From a name without prefix and a leaf's type to the type to write.
        with_copies: Write tensors under the names of their copies too.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for weight in weights:
        leaf = flat[weight.path]
        shape = leaf.shape[1:] if weight.stacked else leaf.shape
        shape = shape[::-1] if weight.transpose else shape
        for layer in range(leaf.shape[0]) if weight.stacked else [0]:
            bare = hf_name(weight, layer, "")
            which = layer if weight.stacked else None
            rows = functools.partial(_rows, leaf, which, weight.transpose)
            tensor = Tensor(np.dtype(dtype_of(bare, leaf.dtype)), shape, rows)
            tensors[hf_name(weight, layer, prefix)] = tensor
            if with_copies:
                tensors |= dict.fromkeys((prefix + copy for copy in weight.copies), tensor)
    return tensors


def write_model_files(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards with an index where one file would be too large.

    Each has tensors of `max_shard_bytes` at most, or a single one, for none is divided.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(directory / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        places = dict(sorted(split.tensor_to_filename.items()))
        index = {"metadata": split.metadata, "weight_map": places}
        write_json(directory / "model.safetensors.index.json", index)
