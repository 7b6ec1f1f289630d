"""Device meshes and the rules that shard every array over them.

One SPMD program runs on any number of devices: `jax.jit` over a mesh whose axes are data
(batches), fsdp (batches and parameters) and tensor (heads and feed-forward).
"""

import contextvars
import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from expandr_jax.errors import UserError

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
WHOLE_BYTES = 2**28  # What every device holds of a parameter at once, where it is made whole.

# Logical axis of a parameter or activation -> mesh axes. Names absent here would replicate in
# silence, so `param_shardings` refuses them.
RULES = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    **dict.fromkeys(  # Not split.
        ("layers", "norm", "head_dim", "positions", "token_types", "buckets", "length", "act_embed")
    ),
}

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """A mesh over the devices; one axis may be -1 to take what the others leave.

    Raises:
        UserError: If the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        others = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // max(1, others)
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices; "
            "the three must multiply to that number (one may be -1)"
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # An axis wants a part of one of the torus's, as 8 of 4 x 4 do.
        split = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(split, AXES, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over every data-parallel device."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_divisor(mesh: Mesh) -> int:
    """Batches must be a multiple of this many rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def device_put(tree: Any, shardings: Any) -> Any:
    """`jax.device_put` that reaches devices of several processes, too.

    Args:
        tree: Arrays that every process has whole, each with the same values, or that are spread
            over the devices already.
        shardings: A sharding for all, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def one(leaf: Any, sharding: Sharding) -> jax.Array:
        spread = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if spread or sharding.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        # device_put would have all processes compare the values first.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda part: host[part])

    return jax.tree.map(one, tree, jax.tree.broadcast(shardings, tree))


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Which of a batch's rows the devices of this process have: [count] int, rising."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[part] for (part,) in parts]))


def device_put_rows(tree: Any, mesh: Mesh, here: np.ndarray, rows: int) -> Any:
    """Batches of which each process has its own rows, over the devices of all.

    Args:
        tree: Arrays with one row, or several side by side, for each of `here`.
        mesh: The devices.
        here: As `rows_here` gives it.
        rows: Rows of the whole batch.
    """
    sharding = batch_sharding(mesh)

    def one(leaf: np.ndarray) -> jax.Array:
        each = len(leaf) // len(here)
        shape = (rows * each, *leaf.shape[1:])

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(here, start // each)) * each
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, tree)


def whole(tree: Any) -> Any:
    """A tree that this process can read: what is spread over several is fetched to its host.

    All processes call it together. With one process the tree is returned as it is.
    """
    return jax.tree.map(_whole_leaf, tree)


def _whole_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return leaf
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    return gathered(leaf)


def gathered(leaf: jax.Array) -> np.ndarray:
    """An array that is spread over a mesh, on this host, a block of each device's part at a time.

    No device holds more than `WHOLE_BYTES` of the others' parts at once, and all blocks of an array
    are one program's: cut by rows of the whole array, each device would be sent all of it first.
    """
    gather, block, devices = gathering(leaf)
    indices = leaf.sharding.devices_indices_map(leaf.shape)
    shape = leaf.sharding.shard_shape(leaf.shape)
    corners = [[part.start or 0 for part in indices[device]] for device in devices]
    result = np.empty(leaf.shape, leaf.dtype)
    for start in itertools.product(*map(range, [0] * leaf.ndim, shape, block)):
        start = np.minimum(start, np.subtract(shape, block))  # The last block overlaps.
        parts = np.asarray(gather(leaf, start.astype(np.int32)).addressable_data(0))
        for part, corner in zip(parts, corners, strict=True):
            first = np.add(corner, start)
            result[tuple(map(slice, first, first + block))] = part
    return result


def gathering(
    leaf: jax.Array | jax.ShapeDtypeStruct,
) -> tuple[Callable[[jax.Array, np.ndarray], jax.Array], tuple[int, ...], np.ndarray]:
    """What `gathered` runs for an array, or its shape with a sharding.

    Returns:
        (array, where in each part a block begins [axes] int32) -> the blocks [parts, ...], on every
        device; the shape of a block; and a device of each part.
    """
    mesh, spec = leaf.sharding.mesh, leaf.sharding.spec
    split = {axis for part in spec for axis in (part if type(part) is tuple else (part,))}
    axes = tuple(axis for axis in mesh.axis_names if axis in split)
    # What lies along other axes are copies.
    devices = mesh.devices[tuple(slice(None) if a in axes else 0 for a in mesh.axis_names)].ravel()
    most = WHOLE_BYTES // (len(devices) * leaf.dtype.itemsize)
    block = _block_shape(leaf.sharding.shard_shape(leaf.shape), most)
    return _gather_program(mesh, spec, axes, block), block, devices


def _block_shape(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """The part of an array, whole along its last axes, that has about `most` items or fewer."""
    block = list(shape)
    for axis in range(len(shape)):
        block[axis] = min(shape[axis], max(1, most // math.prod(block[axis + 1 :])))
    return tuple(block)


@functools.lru_cache(maxsize=64)
def _gather_program(
    mesh: Mesh, spec: PartitionSpec, axes: tuple[str, ...], block: tuple[int, ...]
) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    """The jitted function of `gathering`."""

    def gather(part: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.all_gather(jax.lax.dynamic_slice(part, list(start), block), axes)

    specs = {"in_specs": (spec, PartitionSpec()), "out_specs": PartitionSpec()}
    return jax.jit(jax.shard_map(gather, mesh=mesh, check_vma=False, **specs))


def host_part(array: Any, part: Sequence[slice]) -> np.ndarray:
    """A part of an array of numpy or jax, of whose devices each sends the host what it has of it.

    numpy's own conversion would keep a copy of the whole array on the host for as long as it lives.
    """
    if not isinstance(array, jax.Array) or not array.ndim:
        return np.asarray(array)[tuple(part)]
    low, high = np.transpose([p.indices(n)[:2] for p, n in zip(part, array.shape, strict=True)])
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    result = None if len(shards) == 1 else np.empty(high - low, array.dtype)
    for shard in shards:
        first = np.array([own.start or 0 for own in shard.index])
        begin, end = np.maximum(low, first), np.minimum(high, first + shard.data.shape)
        if (begin >= end).any():
            continue
        # In the host's memory already, it is not copied.
        data = np.asarray(shard.data) if shard.device.platform == "cpu" else shard.data
        found = np.asarray(data[tuple(map(slice, begin - first, end - first))])
        if result is None:
            return found
        result[tuple(map(slice, begin - low, end - low))] = found
    return result


def device_put_shared(tree: Any, shardings: Any) -> Any:
    """`device_put` without needless copies in the host's memory.

    Devices that share the host's memory share one copy of what each of them holds whole, and that
    is the given array itself where it lies there: two of a processor need no more than one.

    Args:
        tree: Arrays of jax or numpy; those of the latter must not be written to afterwards.
        shardings: A sharding for all, or a tree of them.
    """

    def one(leaf: Any, sharding: Sharding) -> jax.Array:
        on_host = all(device.platform == "cpu" for device in sharding.device_set)
        if not (on_host and sharding.is_fully_replicated):
            return device_put(leaf, sharding)
        leaf = np.asarray(leaf)
        devices = sharding.addressable_devices_indices_map(leaf.shape)
        copies = [jax.device_put(leaf, device) for device in devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, copies)

    return jax.tree.map(one, tree, jax.tree.broadcast(shardings, tree))


def param_shardings(mesh: Mesh, module: nn.Module, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
    """Shardings of a module's parameters, from their logical axis names.

    Args:
        mesh: The device mesh.
        module: A Linen module whose parameters carry logical names.
        *args: Arguments of its `__call__` (arrays or ShapeDtypeStructs) to find the shapes.
        **kwargs: Likewise.

    Returns:
        A tree like the module's "params" with a NamedSharding for each leaf. An axis that does not
        divide evenly is replicated, which is said once.
    """
    init = functools.partial(module.init, **kwargs)
    boxed = jax.eval_shape(init, jax.random.key(0), *args)["params"]
    whole_axes = set()

    def sharding_of(leaf: Any) -> NamedSharding:
        axes = _mesh_axes(mesh, leaf.names, leaf.value.shape)
        for name, size, axis in zip(leaf.names, leaf.value.shape, axes, strict=True):
            if axis is None and (wanted := RULES[name]):
                whole_axes.add(f"{name} {size} over {wanted} {mesh.shape[wanted]}")
        return NamedSharding(mesh, PartitionSpec(*axes))

    found = jax.tree.map(sharding_of, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
    if whole_axes:
        _warn_of_whole_axes(", ".join(sorted(whole_axes)))
    return found


def _mesh_axes(mesh: Any, names: Sequence[str | None], shape: Sequence[int]) -> list[Any]:
    """What each axis of an array is split over; None where a mesh does not divide its size."""
    axes = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"logical axis {name!r} has no rule in sharding.RULES")
        axis = None if name is None else RULES[name]
        parts = (axis,) if isinstance(axis, str) else axis or ()
        axes.append(axis if size % math.prod(mesh.shape[part] for part in parts) == 0 else None)
    return axes


@functools.cache
def _warn_of_whole_axes(axes: str) -> None:
    logger.warning("the mesh does not divide %s: every device holds these axes whole", axes)


def adapter_shardings(
    mesh: Mesh, params: Mapping[str, Any], adapter: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Shardings of a LoRA adapter: each side as its kernel's axis, the rank on every device.

    Args:
        mesh: The device mesh.
        params: Shardings of the base, from `param_shardings`.
        adapter: The adapter, or its shapes.
    """
    kernels = traverse_util.flatten_dict(params)

    def sharding_of(path: tuple[str, ...]) -> NamedSharding:
        *stack, width_in, width_out = kernels[(*path[:-1], "kernel")].spec
        sides = (width_in, None) if path[-1] == "a" else (None, width_out)
        return NamedSharding(mesh, PartitionSpec(*stack, *sides))

    flat = traverse_util.flatten_dict(adapter)
    return traverse_util.unflatten_dict({path: sharding_of(path) for path in flat})


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Shapes with the sharding of each, or with one for all."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        jax.tree.broadcast(shardings, shapes),
    )


def bytes_on_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""

    def shape(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
        return leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def platform() -> str:
    """The platform that the program being traced will run on: "cpu", "gpu" or "tpu".

    It is the mesh's of `on_mesh`, which need not be this machine's: a plan is made for others.
    """
    return _platform.get() or jax.default_backend()


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be jitted, with what it computes sharded over a mesh by `RULES`.

    While it is traced, `constrain` and `platform` go by this mesh.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _platform.set(mesh.devices.flat[0].platform)
        try:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)
        finally:
            _platform.reset(token)

    return traced


def constrain(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Shards an activation by the logical names of its axes; outside `on_mesh` it stays as it is.

    Without this a program is right, but where weights and rows share a mesh axis the compiler may
    spread an activation's width over the devices that should hold its rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types):
        return x
    axes = _mesh_axes(mesh, names, x.shape)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))
