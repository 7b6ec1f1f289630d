"""What sampling takes of each device's memory, known before anything is placed there."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.generation.programs import heads_axis, prefill_rows
from expandr_jax.models.decoder import Decoder
from expandr_jax.sharding import batch_divisor

LOGITS_COPIES = 2  # The logits of a step, and what the sampler makes of them.


def cache_type(module: Decoder) -> Any:
    """Type of keys and values where nothing else is asked for: the compute type.

    On CPU it is float32 all the same, which is quicker there.
    """
    return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else module.dtype)


def plan_memory(
    module: Decoder,
    params: Mapping[str, Any],
    *,
    slots: int,
    buckets: tuple[int, ...],
    length: int,
    cache_dtype: Any,
    mesh: Mesh | None,
    penalize: bool = False,
) -> dict[str, int]:
    """Bytes on each device by what they are for.

    Args:
        module: The decoder.
        params: Its parameters, or their shapes.
        slots: Texts sampled at once.
        buckets: Lengths in tokens that prompts are padded to.
        length: Tokens that a slot has room for.
        cache_dtype: Type of keys and values.
        mesh: Slots are split over its data and fsdp axes, heads over its tensor axis.
        penalize: Requests may have a repetition penalty.

    Returns:
        "slots", their keys and values; "prompts", the same of the largest batch of prompts;
        "logits" of a step; and "weights".
    """
    config = module.config
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    token *= jnp.dtype(cache_dtype).itemsize
    shards = 1
    if mesh is not None:
        shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
        token //= mesh.shape["tensor"] if heads_axis(module, mesh) else 1
    rows = slots // (1 if mesh is None else batch_divisor(mesh))
    seen = config.vocab_size if penalize else 0
    prompts = max(prefill_rows(slots, bucket, mesh) * bucket for bucket in buckets)
    itemsize = jnp.dtype(module.dtype).itemsize
    weights = sum(
        leaf.size * (1 if leaf.dtype == jnp.int8 else itemsize) for leaf in jax.tree.leaves(params)
    )
    return {
        "slots": rows * (length * token + seen),
        "prompts": prompts * token,
        "logits": LOGITS_COPIES * rows * config.vocab_size * 4,
        "weights": weights // shards,
    }


def check_memory(plan: Mapping[str, int], limit: int) -> None:
    """Raises UserError, with the figures, if a plan needs more than `limit` bytes."""
    needed = sum(plan.values())
    if needed > limit:
        parts = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in plan.items())
        raise UserError(
            f"sampling needs {needed / 2**30:.3g} GiB a device ({parts}) and may use "
            f"{limit / 2**30:.3g}; take fewer slots, shorter texts or a larger tensor axis"
        )
