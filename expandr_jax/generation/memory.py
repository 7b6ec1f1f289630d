"""What sampling takes of each device's memory, known before anything is allocated there."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from expandr_jax.errors import UserError
from expandr_jax.generation.slots import EngineShape
from expandr_jax.sharding import batch_divisor

LOGITS_COPIES = 2  # The logits of a step, and what the sampler makes of them.


def plan_memory(
    shape: EngineShape, params: Mapping[str, Any], buckets: Sequence[int]
) -> dict[str, int]:
    """Bytes on each device by what they are for; parameters may be shapes.

    They are "slots", their keys and values; "prompts", the same of the largest batch of prompts,
    whose padded lengths are `buckets`; "logits" of a step; and "weights".
    """
    config, mesh = shape.module.config, shape.mesh
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    token *= shape.cache_dtype.itemsize
    token //= mesh.shape["tensor"] if shape.heads_axis else 1
    rows = shape.slots // batch_divisor(mesh)
    seen = config.vocab_size if shape.penalize else 0
    prompts = max(shape.prefill_rows(bucket) * bucket for bucket in buckets)
    itemsize = jnp.dtype(shape.module.dtype).itemsize
    weights = sum(
        leaf.size * (1 if leaf.dtype == jnp.int8 else itemsize) for leaf in jax.tree.leaves(params)
    )
    return {
        "slots": rows * (shape.length * token + seen),
        "prompts": prompts * token,
        "logits": LOGITS_COPIES * rows * config.vocab_size * 4,
        "weights": weights // (mesh.shape["fsdp"] * mesh.shape["tensor"]),
    }


def check_memory(plan: Mapping[str, int], limit: int) -> None:
    """Raises UserError, with the sizes, if a plan needs more than `limit` bytes."""
    needed = sum(plan.values())
    if needed > limit:
        parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in plan.items())
        raise UserError(
            f"sampling needs {needed / 2**30:.3g} GiB a device ({parts}) and may use "
            f"{limit / 2**30:.3g}; take fewer slots, shorter texts or a larger tensor axis"
        )
