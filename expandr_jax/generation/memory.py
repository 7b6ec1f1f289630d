"""Plans the memory that sampling takes on each device, before anything is allocated."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from expandr_jax.errors import UserError
from expandr_jax.generation.slots import EngineShape
from expandr_jax.models.decoder import cast_weights
from expandr_jax.sharding import batch_divisor

LOGITS_COPIES = 2  # The logits of a step, and what the sampler makes of them.


def plan_memory(
    shape: EngineShape,
    params: Mapping[str, Any],
    buckets: Sequence[int],
    held: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Bytes on each device by what they are for; parameters may be shapes.

    They are "slots", their keys and values; "prompts", the same of the largest batch of prompts,
    whose padded lengths are `buckets`; "logits" of a step; "weights", layer by layer; and "stacked
    weights", which stay beside them.

    Args:
        shape: What the engine is compiled for.
        params: Those that it is given.
        buckets: Lengths in tokens.
        held: The parameters that stay on the devices, as training has them; None: `params`.
    """
    config, mesh = shape.module.config, shape.mesh
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    token *= shape.cache_dtype.itemsize
    token //= mesh.shape["tensor"] if shape.heads_axis else 1
    rows = shape.slots // batch_divisor(mesh)
    seen = config.vocab_size if shape.penalize else 0
    prompts = max(shape.prefill_rows(bucket) * bucket for bucket in buckets)
    own = jax.eval_shape(functools.partial(cast_weights, dtype=shape.module.dtype), params)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(own))
    return {
        "slots": rows * (shape.length * token + seen),
        "prompts": prompts * token,
        "logits": LOGITS_COPIES * rows * config.vocab_size * 4,
        "weights": weights // (mesh.shape["fsdp"] * mesh.shape["tensor"]),
        "stacked weights": _bytes_beside(params if held is None else held, shape.module.dtype),
    }


def _bytes_beside(params: Mapping[str, Any], dtype: Any) -> int:
    """Bytes of a device that parameters take beside an engine's own copy of them.

    A processor's engine has no copy of arrays that lie there whole and in its type: its layers are
    views of them. Arrays of the host and shapes take nothing of a device.
    """

    def held(leaf: Any, used: jax.ShapeDtypeStruct) -> int:
        if not isinstance(leaf, jax.Array):
            return 0
        on_host = all(device.platform == "cpu" for device in leaf.sharding.device_set)
        if on_host and leaf.is_fully_replicated and leaf.dtype == used.dtype:
            return 0
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    used = jax.eval_shape(functools.partial(cast_weights, dtype=dtype), params)
    return sum(jax.tree.leaves(jax.tree.map(held, params, used)))


def check_memory(plan: Mapping[str, int], limit: int) -> None:
    """Raises UserError, with the sizes, if a plan needs more than `limit` bytes."""
    needed = sum(plan.values())
    if needed > limit:
        parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in plan.items())
        raise UserError(
            f"sampling needs {needed / 2**30:.3g} GiB a device ({parts}) and may use "
            f"{limit / 2**30:.3g}; take fewer slots, shorter texts or a larger tensor axis"
        )
