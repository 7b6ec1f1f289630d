"""Scaled dot-product attention: the one place where its layout and kernel are chosen.

Scores are computed heads-major, with the query heads of a group side by side, so that grouped-query
attention is one batched matrix product per group and keys are never repeated. Rows are divided by
their sum after the product with the values, which touches far fewer numbers than before it. On CPU
this is the quickest of the forms tried, forward and backward. On TPUs splash attention takes its
place, and on NVIDIA GPUs cuDNN's fused kernel in half precision, where they can: nothing of the
size of the scores is stored then.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from expandr_jax.models.mask import Mask
from expandr_jax.models.splash import splash_attend, suits_splash
from expandr_jax.sharding import platform

# Finite, so that a query that may attend to nothing gives numbers (of no meaning) and not NaN.
_MASKED = -1e30


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: Mask,
    scale: float,
    bias: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Attends from each query to the keys that its mask allows; the softmax is in float32.

    Args:
        q: Queries [batch, length, heads, head_dim].
        k: Keys [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
        v: Values, shaped as `k`.
        mask: Which of them each query may attend to.
        scale: Factor on the scores, usually head_dim ** -0.5.
        bias: [heads, length, keys], added to the scores of every row (T5's relative positions).
        dropout: Applied to the attention weights.

    Returns:
        [batch, length, heads, head_dim] in q's type.
    """
    batch, length, heads, head_dim = q.shape
    plain = bias is not None or dropout is not None
    if not plain and platform() == "tpu" and suits_splash(length, k.shape[1], batch, mask):
        return splash_attend(q, k, v, mask, scale)
    if not plain and platform() == "gpu" and _suits_cudnn(q, k):
        whole = jnp.broadcast_to(mask.dense(length)[:, None], (batch, 1, length, k.shape[1]))
        k, v = k.astype(q.dtype), v.astype(q.dtype)
        return jax.nn.dot_product_attention(
            q, k, v, mask=whole, scale=scale, implementation="cudnn"
        )
    groups = k.shape[2]
    rows = (batch, groups, heads // groups, length)
    q_rows = q.reshape(batch, length, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_rows = (q_rows * scale).astype(q.dtype).reshape(batch, groups, -1, head_dim)
    k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in (k, v))

    scores = jnp.einsum("bkth,bksh->bkts", q_rows, k, preferred_element_type=jnp.float32)
    scores = scores.reshape(*rows, -1)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(1, *rows[1:], -1)
    scores = jnp.where(mask.dense(length)[:, None, None], scores, _MASKED)
    # The maximum only guards against overflow: it cancels, so no gradient flows through it.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout is not None:
        weights = dropout(weights)
    weights = weights.astype(q.dtype).reshape(batch, groups, -1, weights.shape[-1])
    out = jnp.einsum("bkts,bksh->bkth", weights, v, preferred_element_type=jnp.float32)
    out = (out.reshape(*rows, head_dim) / total).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim).astype(q.dtype)


def _suits_cudnn(q: jax.Array, k: jax.Array) -> bool:
    """Whether cuDNN's fused attention takes these shapes and types, forward and backward."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    device = jax.devices()[0]
    modern = device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8.0
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    return modern and even and q.shape[3] % 8 == 0 and q.shape[3] <= 128


def attend_with_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cached_keys: jax.Array,
    cached_values: jax.Array,
    slot: jax.Array,
    mask: jax.Array,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Writes one new token per row into a cache, then attends to what the cache holds.

    Keys are stored with their slots innermost, which makes both products of a step plain ones, and
    written before they are read, which lets XLA update the cache in place.

    Args:
        q: Queries [batch, 1, heads, head_dim].
        k: New keys [batch, 1, kv_heads, head_dim].
        v: New values, shaped as `k`.
        cached_keys: [batch, kv_heads, head_dim, slots].
        cached_values: [batch, kv_heads, slots, head_dim].
        slot: [batch] int32, the one that each row's new token takes.
        mask: [batch, 1, slots] bool, True where attention is allowed, the new token's slot too.
        scale: Factor on the scores, usually head_dim ** -0.5.

    Returns:
        [batch, 1, heads, head_dim] in q's type, and both caches with the new tokens.
    """
    batch, _, heads, head_dim = q.shape
    dtype = cached_keys.dtype
    k, v = k.astype(dtype).transpose(0, 2, 3, 1), v.astype(dtype).swapaxes(1, 2)
    if platform() == "tpu":
        # A write to another slot in each row becomes a loop over the rows there, which by the
        # compiler's estimate takes many times as long as to write all of it anew.
        new = jnp.arange(cached_keys.shape[3])[None] == slot[:, None]
        cached_keys = jnp.where(new[:, None, None], k, cached_keys)
        cached_values = jnp.where(new[:, None, :, None], v, cached_values)
    else:
        write = jax.vmap(jax.lax.dynamic_update_slice)
        zero = jnp.zeros_like(slot)
        cached_keys = write(cached_keys, k, jnp.stack([zero, zero, slot], 1))
        cached_values = write(cached_values, v, jnp.stack([zero, slot, zero], 1))
    rows = (q * scale).astype(dtype).reshape(batch, k.shape[1], -1, head_dim)
    scores = jnp.einsum("bkgd,bkds->bkgs", rows, cached_keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
    out = jnp.einsum("bkgs,bksd->bkgd", weights, cached_values, preferred_element_type=jnp.float32)
    return out.reshape(batch, 1, heads, head_dim).astype(q.dtype), cached_keys, cached_values
