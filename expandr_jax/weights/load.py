"""Fills parameter trees from a model's files, onto the devices, a piece of a tensor at a time.

What is resident beyond the parameters themselves is a few pieces, whatever the model's size.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding

from expandr_jax.errors import UserError
from expandr_jax.models.quantized import kept_shapes, kept_type, quantize, whole_shape
from expandr_jax.models.stack import initial_shapes
from expandr_jax.sharding import device_put
from expandr_jax.weights.families import example_inputs, family_of
from expandr_jax.weights.fields import one_line
from expandr_jax.weights.files import ModelFiles
from expandr_jax.weights.names import Weight, hf_name

# Leaves up to this size are made whole; larger ones are filled by pieces of about this size.
PIECE_BYTES = 64 * 2**20

Piece = tuple[tuple[int, ...], np.ndarray]


def load_params(
    files: ModelFiles,
    module: nn.Module,
    weights: Sequence[Weight],
    dtype: Any,
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fills a parameter tree.

    Args:
        files: The model's files.
        module: Decides the shapes.
        weights: The model's table.
        dtype: Type of the parameters, but for those of norms, which are small and stay in float32,
            and for kernels that the module has in fewer bits.
        shardings: A tree as `sharding.param_shardings` makes it; None means the default device.

    Returns:
        A nested dict of arrays.

    Raises:
        UserError: If a tensor is missing, unknown, wrongly shaped, or not finite.
    """
    dtype = np.dtype(dtype)
    expected = leaf_shapes(module)
    stored = find_tensors(files, module, weights, expected)
    by_path = {} if shardings is None else traverse_util.flatten_dict(shardings, sep="/")
    flat = {}
    for weight in weights:
        shape, names = expected[weight.path], stored[weight.path]
        scale_path = f"{weight.path}_scale"
        in_float = "norm/" in weight.path or scale_path in expected
        own = np.dtype(np.float32) if in_float else dtype
        pieces = _pieces(files, weight, names, shape, own)
        if scale_path in expected:
            form, scales = module.config.quantized, np.empty(expected[scale_path], np.float32)
            pieces = _quantized(form, pieces, scales)
            own, shape = kept_type(form), (*shape[:-2], *kept_shapes(form, *shape[-2:])[0])
        flat[weight.path] = _assemble(pieces, shape, own, by_path.get(weight.path))
        if scale_path in expected:
            flat[scale_path] = _device_put(scales, by_path.get(scale_path))
    return traverse_util.unflatten_dict(flat, sep="/")


def leaf_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters by path, keys joined by "/"; those of whole kernels."""
    variables = initial_shapes(module, *example_inputs(module))
    flat = traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")
    return {p: whole_shape(x) if p.endswith("/kernel") else x.shape for p, x in flat.items()}


def find_tensors(
    files: ModelFiles,
    module: nn.Module,
    weights: Sequence[Weight],
    expected: Mapping[str, tuple[int, ...]],
) -> dict[str, list[str]]:
    """Names of the tensors that each leaf of `expected` shapes holds, by the leaf's path.

    Raises:
        UserError: If a tensor is missing, unknown or wrongly shaped.
    """
    tensors, family = files.tensors, family_of(module)
    # The one under which the file keeps the most.
    prefix = max(family.prefixes, key=lambda p: sum(hf_name(w, 0, p) in tensors for w in weights))
    stored, known = {}, set()
    for weight in weights:
        layers = range(expected[weight.path][0]) if weight.stacked else [0]
        names = [hf_name(weight, layer, prefix) for layer in layers]
        copies = [name for name in weight.copies if name in tensors]
        if copies and names[0] not in tensors:
            names = [copies.pop(0)]
        stored[weight.path] = names
        known |= {*names, *copies}
    wanted = {name for names in stored.values() for name in names}
    _complain(files.where, "are missing", wanted - tensors.keys())
    ignored = re.compile("|".join(family.ignored))
    unknown = (name for name in tensors.keys() - known if not ignored.fullmatch(name))
    _complain(files.where, "are unknown", unknown)
    wrong = []
    for weight in weights:
        shape = expected[weight.path][1:] if weight.stacked else expected[weight.path]
        shape = shape[::-1] if weight.transpose else shape
        shapes = {name: tensors[name].shape for name in stored[weight.path]}
        wrong += [f"{n} {s} (expected {shape})" for n, s in shapes.items() if s != shape]
    _complain(files.where, "have the wrong shape", wrong)
    types = {name: tensors[name].dtype for name in wanted}
    whole = {f"{n} ({t})" for n, t in types.items() if not jnp.issubdtype(t, jnp.floating)}
    _complain(files.where, "are not of a floating type; quantized ones are read from GGUF", whole)
    for weight in weights:
        _check_copies(files, stored[weight.path][0], weight.copies)
    return stored


def _check_copies(files: ModelFiles, name: str, copies: Iterable[str]) -> None:
    def equals(copy: str) -> bool:
        return files.tensors[copy].shape == files.tensors[name].shape and all(
            np.array_equal(files.read(name, rows), files.read(copy, rows))
            for rows in row_slices(files.tensors[name].shape)
        )

    different = [n for n in copies if n in files.tensors and n != name and not equals(n)]
    what = f"should equal {name}, by config.json and the family, and do not"
    _complain(files.where, what, different)


def _complain(where: str, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(
            f"{where}: {len(names)} tensors {what}: {one_line(', '.join(names[:5]))}{rest}"
        )


def _pieces(
    files: ModelFiles,
    weight: Weight,
    names: Sequence[str],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Iterator[Piece]:
    """Parts of a leaf, each with where it begins; the whole leaf where it is small."""
    if math.prod(shape) * dtype.itemsize <= PIECE_BYTES:
        leaf = np.empty(shape, dtype)
        for index, name in enumerate(names):
            tensor = read_tensor(files, name, slice(None))
            (leaf[index] if weight.stacked else leaf)[...] = _ours(weight, tensor)
        yield (0,) * len(shape), leaf
        return
    for index, name in enumerate(names):
        for rows in row_slices(files.tensors[name].shape):
            part = np.ascontiguousarray(_ours(weight, read_tensor(files, name, rows)), dtype)
            start = (0,) * (part.ndim - 1)
            start = (*start, rows.start) if weight.transpose else (rows.start, *start)
            yield ((index, *start), part[None]) if weight.stacked else (start, part)


def _quantized(form: str, pieces: Iterable[Piece], scales: np.ndarray) -> Iterator[Piece]:
    """Kernels [..., in, out], of which pieces have all inputs, in a form; writes their scales."""
    for start, part in pieces:
        kept, scale = quantize(form, part)
        *stack, _, first = (slice(b, b + n) for b, n in zip(start, part.shape, strict=True))
        scales[(*stack, ..., first)] = scale
        yield start, kept


def row_slices(shape: tuple[int, ...]) -> list[slice]:
    """Cuts a tensor by rows into parts of about PIECE_BYTES in float32."""
    step = max(1, PIECE_BYTES // (4 * math.prod(shape[1:])))
    return [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]


def _ours(weight: Weight, tensor: np.ndarray) -> np.ndarray:
    return tensor.T if weight.transpose else tensor


def read_tensor(files: ModelFiles, name: str, rows: slice) -> np.ndarray:
    """Some rows of a tensor, of float32 or less; UserError if a number is not finite."""
    tensor = files.read(name, rows)
    if tensor.dtype == np.float64:
        with np.errstate(over="ignore"):
            tensor = tensor.astype(np.float32)
    if not np.isfinite(tensor).all():
        _complain(files.where, "have NaN or infinite values", [name])
    return tensor


def _device_put(leaf: np.ndarray, sharding: Sharding | None) -> jax.Array:
    return jax.device_put(leaf) if sharding is None else device_put(leaf, sharding)


@jax.jit(donate_argnums=0)
def _write(buffer: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(buffer, piece, start)


def _assemble(
    pieces: Iterator[Piece], shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding | None
) -> jax.Array:
    """Writes a leaf's pieces into each device's shard of it."""
    first = next(pieces)
    if first[1].shape == shape:
        return _device_put(first[1], sharding)
    indices = {None: (slice(None),) * len(shape)}
    if sharding is not None:
        indices = sharding.addressable_devices_indices_map(shape)
    limits = {  # Where each device's shard begins and ends, along each axis.
        device: np.array([part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]).T
        for device, index in indices.items()
    }
    shards = {
        device: jnp.zeros(tuple(high - low), dtype, device=device)
        for device, (low, high) in limits.items()
    }
    for start, piece in itertools.chain([first], pieces):
        for device, (low, high) in limits.items():
            # The part of this piece that lies in the device's shard.
            begin, end = np.maximum(start, low), np.minimum(np.add(start, piece.shape), high)
            if (begin < end).all():
                cut = piece[tuple(map(slice, begin - start, end - start))]
                cut = jax.device_put(cut, device)
                shards[device] = _write(shards[device], cut, tuple(begin - low))
        # Waiting here is what bounds the number of pieces that are alive.
        jax.block_until_ready(list(shards.values()))
    if sharding is None:
        return shards[None]
    return jax.make_array_from_single_device_arrays(shape, sharding, list(shards.values()))
