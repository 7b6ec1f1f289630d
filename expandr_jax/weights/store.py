"""Writes parameter trees as safetensors files, a part of a tensor at a time.

What is resident beyond the parameters themselves is one tensor of one layer. Parameters may stay in
a model's files, too: of them nothing else is resident, on the host or on a device.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from expandr_jax.files.records import write_json
from expandr_jax.models.lora import LoraConfig
from expandr_jax.sharding import host_part
from expandr_jax.weights.files import ModelFiles
from expandr_jax.weights.load import find_tensors, leaf_shapes, read_tensor, row_slices
from expandr_jax.weights.names import Weight, hf_name
from expandr_jax.weights.safetensors_file import Tensor, write_safetensors

_PART_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """A leaf of parameters that stays in a model's files.

    Attributes:
        shape: As the module has it.
        files: Where it is.
        weight: Its place in the model's table.
        names: The tensors that it holds, one for each layer.
        updates: Low-rank updates to add, in their order: (a [layers, in, rank], b [layers, rank,
            out], scale).
    """

    shape: tuple[int, ...]
    files: ModelFiles
    weight: Weight
    names: Sequence[str]
    updates: tuple[tuple[np.ndarray, np.ndarray, float], ...] = ()

    @property
    def dtype(self) -> np.dtype:
        """float32, whatever the files have."""
        return np.dtype(np.float32)

    def rows(self, layer: int) -> Iterator[np.ndarray]:
        """The rows of a layer's tensor in the Hugging Face layout, read when they are asked for."""
        name = self.names[layer]
        if not self.updates:
            for rows in row_slices(self.files.tensors[name].shape):
                yield read_tensor(self.files, name, rows).astype(self.dtype, copy=False)
            return
        tensor = read_tensor(self.files, name, slice(None)).astype(self.dtype, copy=False)
        for a, b, scale in self.updates:
            # In float32 on accelerators, too, whose default is less.
            update = jnp.matmul(a[layer], b[layer], precision="highest") * scale
            update = np.asarray(update)
            tensor += update.T if self.weight.transpose else update
        yield tensor


def stored_params(
    files: ModelFiles, module: nn.Module, weights: Sequence[Weight]
) -> dict[str, Any]:
    """Parameters that stay in a model's files: what `load_params` would fill, none of it read.

    Each leaf is a `StoredLeaf`. Arguments and errors are those of `load_params`, but for numbers
    that are not finite, which are found when they are read.
    """
    shapes = leaf_shapes(module)
    names = find_tensors(files, module, weights, shapes)
    flat = {w.path: StoredLeaf(shapes[w.path], files, w, names[w.path]) for w in weights}
    return traverse_util.unflatten_dict(flat, sep="/")


def merge_stored(
    params: Mapping[str, Any], adapter: Mapping[str, Any], config: LoraConfig
) -> dict[str, Any]:
    """`merge_lora` for parameters that stay in files: each tensor is merged when it is read."""
    flat = dict(traverse_util.flatten_dict(params))
    update = traverse_util.flatten_dict(adapter)
    for path in {path[:-1] for path in update}:
        leaf = flat[(*path, "kernel")]
        a, b = (np.asarray(update[(*path, name)], np.float32) for name in ("a", "b"))
        updates = (*leaf.updates, (a, b, config.scale))
        flat[(*path, "kernel")] = dataclasses.replace(leaf, updates=updates)
    return traverse_util.unflatten_dict(flat)


def _rows(leaf: Any, weight: Weight, layer: int) -> Iterator[np.ndarray]:
    """The rows of one tensor in the Hugging Face layout, fetched when they are asked for."""
    shape = leaf.shape[1:] if weight.stacked else leaf.shape
    axis = len(shape) - 1 if weight.transpose else 0  # The axis of the tensor's rows.
    step = max(1, _PART_BYTES * shape[axis] // (leaf.dtype.itemsize * math.prod(shape)))
    for start in range(0, shape[axis], step):
        part = [slice(None)] * len(shape)
        part[axis] = slice(start, start + step)
        if weight.stacked:
            rows = host_part(leaf, [slice(layer, layer + 1), *part])[0]
        else:
            rows = host_part(leaf, part)
        yield rows.T if weight.transpose else rows


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
        params: Parameter tree, of arrays or of `StoredLeaf`s.
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
            if isinstance(leaf, StoredLeaf):
                rows = functools.partial(leaf.rows, layer)
            else:
                rows = functools.partial(_rows, leaf, weight, layer)
            tensor = Tensor(np.dtype(dtype_of(bare, leaf.dtype)), shape, rows)
            tensors[hf_name(weight, layer, prefix)] = tensor
            if with_copies:
                tensors |= dict.fromkeys((prefix + copy for copy in weight.copies), tensor)
    return tensors


def write_model_files(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int) -> None:
    """Writes model.safetensors, or shards with an index where one file would be too large.

    Each has tensors of `max_shard_bytes` at most, or a single one, for none is divided.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

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
