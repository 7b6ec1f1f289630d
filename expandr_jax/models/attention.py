"""Scaled dot-product attention: the one place where its layout and kernel are chosen.

Scores are computed heads-major, with the query heads of a group side by side, so that grouped-query
attention is one batched matrix product per group and keys are never repeated. Rows are divided by
their sum after the product with the values, which touches far fewer numbers than before it. On CPU
this is the quickest of the forms tried, forward and backward. On TPUs splash attention takes its
place, and on NVIDIA GPUs cuDNN's fused kernel in half precision, where they can: nothing of the
size of the scores is stored then. A bias, which all rows share, goes with cuDNN's alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from expandr_jax.models.mask import Mask
from expandr_jax.models.splash import splash_attend, suits_splash
from expandr_jax.sharding import platform

# Finite, so that a query that may attend to nothing gives numbers (of no meaning) and not NaN.
_MASKED = -1e30
_MORE = 8  # cuDNN wants widths of heads in steps of it.


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
    fused = "" if dropout is not None else platform()
    if fused == "tpu" and bias is None and suits_splash(length, k.shape[1], batch, mask):
        return splash_attend(q, k, v, mask, scale)
    if fused == "gpu" and _suits_cudnn(q, k, bias):
        allowed = mask.dense(length)
        if bias is None:
            return _by_cudnn(q, k, v, scale, mask=allowed)
        if allowed.shape[1] == 1:  # Which keys are padding, the same for all queries.
            wider = _without_padding(q, k, v, allowed[:, 0])
            return _by_cudnn(*wider, scale, bias=bias)[..., :head_dim]
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


def _by_cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    *,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """cuDNN's fused attention with a mask or a bias; arguments as of `attend`."""
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None], (len(q), 1, q.shape[1], k.shape[1]))
    if bias is not None:
        bias = bias[None].astype(q.dtype)
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    return jax.nn.dot_product_attention(
        q, k, v, bias=bias, mask=mask, scale=scale, implementation="cudnn"
    )


def _without_padding(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of a width that is greater by `_MORE`, where no mask is needed.

    A mask would become a part of the bias, which would have the size of all scores then, as its
    gradient would. Here a product with a number of each key takes padding [batch, keys] out.
    """
    one = jnp.zeros((_MORE,), q.dtype).at[0].set(1)
    away = jnp.where(real, 0, _MASKED)[..., None, None] * one

    def wider(x: jax.Array, more: jax.Array) -> jax.Array:
        more = jnp.broadcast_to(more, (*x.shape[:3], _MORE))
        return jnp.concatenate([x, more.astype(q.dtype)], axis=-1)

    return wider(q, one), wider(k.astype(q.dtype), away), wider(v.astype(q.dtype), 0 * one)


def _suits_cudnn(q: jax.Array, k: jax.Array, bias: jax.Array | None) -> bool:
    """Whether cuDNN's fused attention takes these shapes and types, forward and backward."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or (bias is not None and q.dtype == jnp.float16):
        return False  # `_MASKED` is beyond float16.
    device = jax.devices()[0]
    modern = device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8.0
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    most = 128 if bias is None else 128 - _MORE
    return modern and even and q.shape[3] % 8 == 0 and q.shape[3] <= most


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
