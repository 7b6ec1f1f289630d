"""Scaled dot-product attention: the one place where its layout and kernel are chosen.

Scores are computed heads-major, with the query heads of a group side by side, so that grouped-query
attention is one batched matrix product per group and keys are never repeated. Rows are divided by
their sum after the product with the values, which touches far fewer numbers than before it. On CPU
this is the quickest of the forms tried, forward and backward.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

# Finite, so that a query that may attend to nothing gives numbers (of no meaning) and not NaN.
_MASKED = -1e30


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """Attends from each query to the keys that its mask allows; the softmax is in float32.

    Args:
        q: Queries [batch, length, heads, head_dim].
        k: Keys [batch, keys, kv_heads, head_dim]; kv_heads divides heads.
        v: Values, shaped as `k`.
        mask: [batch, length or 1, keys] bool, True where attention is allowed.
        scale: Factor on the scores, usually head_dim ** -0.5.
        dropout: Applied to the attention weights.

    Returns:
        [batch, length, heads, head_dim] in q's type.
    """
    return _attend(q, [(k.swapaxes(1, 2), v.swapaxes(1, 2), mask)], scale, dropout)


def attend_with_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    cached_keys: jax.Array,
    cached_values: jax.Array,
    cache_mask: jax.Array,
    scale: float,
) -> jax.Array:
    """Attends to cached and new keys at once, without joining them in memory.

    Args:
        q: Queries [batch, length, heads, head_dim].
        k: New keys [batch, length, kv_heads, head_dim].
        v: New values, shaped as `k`.
        mask: [batch, length, length] bool, over the new keys.
        cached_keys: [batch, kv_heads, slots, head_dim].
        cached_values: Shaped as `cached_keys`.
        cache_mask: [batch, length, slots] bool, over the cached keys.
        scale: Factor on the scores.

    Returns:
        [batch, length, heads, head_dim] in q's type.
    """
    new = (k.swapaxes(1, 2), v.swapaxes(1, 2), mask)
    return _attend(q, [(cached_keys, cached_values, cache_mask), new], scale, None)


def _attend(
    q: jax.Array,
    blocks: Sequence[tuple[jax.Array, jax.Array, jax.Array]],
    scale: float,
    dropout: Callable[[jax.Array], jax.Array] | None,
) -> jax.Array:
    """One softmax over blocks of (keys, values [batch, kv_heads, keys, head_dim], mask)."""
    batch, length, heads, head_dim = q.shape
    groups = blocks[0][0].shape[1]
    rows = (batch, groups, heads // groups, length)
    q_rows = q.reshape(batch, length, groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
    q_rows = (q_rows * scale).astype(q.dtype).reshape(batch, groups, -1, head_dim)

    scores = []
    for k, _, mask in blocks:
        s = jnp.einsum(
            "bkth,bksh->bkts", q_rows, k.astype(q.dtype), preferred_element_type=jnp.float32
        )
        s = jnp.where(mask[:, None, None], s.reshape(*rows, -1), _MASKED)
        scores.append(s)
    # The maximum only guards against overflow: it cancels, so no gradient flows through it.
    peak = [jnp.max(s, axis=-1, keepdims=True) for s in scores]
    peak = jax.lax.stop_gradient(jnp.max(jnp.concatenate(peak, axis=-1), axis=-1, keepdims=True))

    total, out = 0.0, 0.0
    for s, (_, v, _) in zip(scores, blocks, strict=True):
        weights = jnp.exp(s - peak)
        total += jnp.sum(weights, axis=-1, keepdims=True)
        if dropout is not None:
            weights = dropout(weights)
        weights = weights.astype(q.dtype).reshape(batch, groups, -1, weights.shape[-1])
        out += jnp.einsum(
            "bkts,bksh->bkth", weights, v.astype(q.dtype), preferred_element_type=jnp.float32
        ).reshape(*rows, head_dim)
    out = (out / total).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim).astype(q.dtype)
