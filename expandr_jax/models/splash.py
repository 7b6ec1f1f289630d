"""TPU's splash attention: nothing of the size of the scores is stored, forward or backward.

The kernel comes with jax. It takes its mask as a rule of positions, fixed when the program is
made, and as segments; here a `Mask` is put into these terms, and the call is spread over the mesh,
which XLA cannot do for a kernel.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from expandr_jax.models.mask import Mask
from expandr_jax.sharding import RULES

_LANES = 128  # The kernel's blocks are multiples of this.
_BLOCKS = (512, 384, 256, 128)


def suits_splash(queries: int, keys: int, batch: int, mask: Mask) -> bool:
    """Whether splash attention can stand in, where a program is made for TPUs.

    It gains nothing where there are few queries. It cannot where the mask is no rule of positions
    and segments, or where there are several devices and `jax.set_mesh` has not said how they are
    arranged.
    """
    if queries < _LANES or mask.segments is None:
        return False
    if mask.window is not None and mask.responses and mask.window < keys:
        return False  # A later response continues the prompt's positions from farther away.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return batch % math.prod(mesh.shape[axis] for axis in _axes(mesh, "batch")) == 0


def splash_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.attend`, by the kernel, with a mask that `suits_splash`.

    `interpret` runs the kernel's program by other means, on any platform.
    """
    length, keys = q.shape[1], k.shape[1]
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    q = (q * scale).astype(q.dtype)
    segments = mask.segments
    own = segments[:, keys - length :]
    if mask.responses:
        # The kernel compares segments for equality only. So the first response and the prompt are
        # one segment, and each further response has keys of the prompt's own copy before the rest.
        own = jnp.where(own == 1, 2, own)
        copies = [jnp.where(segments == 1, i, 0) for i in range(3, mask.responses + 2)]
        segments = jnp.concatenate([*copies, jnp.where(segments == 1, 2, segments)], axis=1)
        k, v = (jnp.concatenate([x] * mask.responses, axis=1) for x in (k, v))
    offset = k.shape[1] - length
    q, own = _lengthen(q), _lengthen(own)
    k, v, segments = _lengthen(k), _lengthen(v), _lengthen(segments)
    shape = q.shape[1], k.shape[1]

    def run(rule, q, k, v, own, segments):
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([rule] * q.shape[1]),
            block_sizes=_block_sizes(*shape),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(own, segments))

    everywhere = masks.CausalMask(shape, offset) if mask.causal else masks.FullMask(shape)
    windowed = mask.windowed
    if mask.window is None or mask.window >= keys or windowed is False:
        windowed, nearby = False, everywhere
    else:
        after = 0 if mask.causal else mask.window - 1
        nearby = masks.LocalMask(shape, (mask.window - 1, after), offset)
        windowed = True if windowed is None else windowed

    def local(windowed, *arrays):
        if isinstance(windowed, bool):
            return run(nearby if windowed else everywhere, *arrays)
        branches = (functools.partial(run, rule) for rule in (nearby, everywhere))
        return jax.lax.cond(windowed, *branches, *arrays)

    arrays = (*(x.swapaxes(1, 2) for x in (q, k, v)), own, segments)
    out = _spread(local, windowed, arrays)
    return out.swapaxes(1, 2)[:, :length]


def _lengthen(x: jax.Array) -> jax.Array:
    """Pads [batch, length, ...] with zeros, to a length that blocks divide."""
    more = -x.shape[1] % _LANES
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))


def _block_sizes(queries: int, keys: int) -> kernels.BlockSizes:
    bq, bk = (next(size for size in _BLOCKS if n % size == 0) for n in (queries, keys))
    return kernels.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk,
        block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk,
        block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip


def _spread(local, windowed, arrays):
    """Calls local(windowed, q, k, v, own, segments) for each device's rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(kind == AxisType.Manual for kind in mesh.axis_types):
        return local(windowed, *arrays)
    rows, heads = _axes(mesh, "batch"), _axes(mesh, "kv_heads")
    if arrays[1].shape[1] % math.prod(mesh.shape[axis] for axis in heads):
        heads = ()
    by_head, by_row = PartitionSpec(rows, heads), PartitionSpec(rows)
    specs = (by_head,) * 3 + (by_row,) * 2
    if isinstance(windowed, bool):
        local = functools.partial(local, windowed)
    else:
        arrays, specs = (windowed, *arrays), (PartitionSpec(), *specs)
    return jax.shard_map(local, in_specs=specs, out_specs=by_head, check_vma=False)(*arrays)


def _axes(mesh: AbstractMesh, name: str) -> tuple[str, ...]:
    """The mesh's axes that a logical axis is spread over, without those already spread."""
    axes = RULES[name]
    axes = (axes,) if isinstance(axes, str) else axes
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in axes if kinds.get(axis, AxisType.Manual) != AxisType.Manual)
