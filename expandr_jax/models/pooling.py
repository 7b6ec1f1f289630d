"""From one vector a token to one vector a text."""

from typing import Literal

import jax
import jax.numpy as jnp

Pooling = Literal["mean", "cls", "last"]


def pool(hidden: jax.Array, mask: jax.Array, kind: Pooling) -> jax.Array:
    """Pools hidden states over the real tokens, wherever the padding is.

    Args:
        hidden: [batch, length, width].
        mask: [batch, length], 1 for real tokens.
        kind: "mean" of the real tokens, "cls" for the first of them, "last" for the last.

    Returns:
        [batch, width] float32; a row without tokens gives zeros under "mean".
    """
    if kind == "mean":
        weights = mask.astype(jnp.float32)
        total = jnp.einsum("btd,bt->bd", hidden, weights, preferred_element_type=jnp.float32)
        return total / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    if kind == "cls":
        place = jnp.argmax(mask, axis=1)
    else:
        place = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, place[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales the last axis to length one, in float32; zero stays zero, with zero gradient."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    present = squares > 1e-24  # PyTorch's floor of the length, 1e-12, squared
    return jnp.where(present, x * jax.lax.rsqrt(jnp.where(present, squares, 1.0)), 0.0)
