"""From one vector a token to one vector a text."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

BLOCK_TOKENS = 8  # Tokens at a text's end that a block has (LLaRA, arXiv 2312.15503).
# "decoder" is for encoder-decoders: their only output is the decoder's first position; "splade" for
# `SpladeEncoder`, which pools by itself.
Pooling = Literal["mean", "cls", "last", "decoder", "splade", "block"]

DENSE_ACTIVATIONS = {"identity": lambda x: x, "tanh": jnp.tanh}


def pool(hidden: jax.Array, mask: jax.Array, kind: Pooling) -> jax.Array:
    """Pools hidden states over the real tokens, wherever the padding is.

    Args:
        hidden: [batch, length, width].
        mask: [batch, length], 1 for real tokens.
        kind: "mean" of the real tokens, "cls" for the first of them, "last" for the last, "block"
            for the mean of the last `BLOCK_TOKENS`;
            "decoder" for `hidden` of length one, which the mask does not concern; "splade" for
            what is [batch, width] already.

    Returns:
        [batch, width] float32; zeros for a row without tokens, so that its score is 0.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind == "splade":
        return hidden.astype(jnp.float32)
    if kind == "decoder":
        return hidden[:, 0].astype(jnp.float32)
    if kind in ("mean", "block"):
        weights = (mask > 0).astype(jnp.float32)
        if kind == "block":
            left = jnp.cumsum(weights[:, ::-1], axis=1)[:, ::-1]  # Real tokens from here on.
            weights = weights * (left <= BLOCK_TOKENS)
        total = jnp.einsum("btd,bt->bd", hidden, weights, preferred_element_type=jnp.float32)
        return total / jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    if kind == "cls":
        position = jnp.argmax(mask, axis=1)
    elif kind == "last":
        position = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    else:
        raise ValueError(f"unknown pooling {kind!r}: mean, cls, last, block, decoder or splade")
    found = jnp.take_along_axis(hidden, position[:, None, None], axis=1)[:, 0].astype(jnp.float32)
    return jnp.where(jnp.any(mask > 0, axis=1, keepdims=True), found, 0.0)


def dense(x: jax.Array, params: Mapping[str, jax.Array], activation: str) -> jax.Array:
    """The layer that sentence-transformers calls Dense, [batch, in] to [batch, out], in float32.

    Its parameters are "kernel" [in, out] and, optionally, "bias" [out]; `activation` is a key of
    `DENSE_ACTIVATIONS`.
    """
    y = jnp.dot(x, params["kernel"].astype(jnp.float32))
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return DENSE_ACTIVATIONS[activation](y)


def dense_name(number: int) -> str:
    """The key, beside a module's parameters, of those of a layer after pooling, from 0 on."""
    return f"dense_{number + 1}" if number else "dense"  # Checkpoints of one layer have no number.


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales the last axis to length one, in float32; zero stays zero, with zero gradient."""
    x = x.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # PyTorch's floor of the length, 1e-12, squared. NaN is not below it, and so stays NaN.
    absent = squares <= 1e-24
    return jnp.where(absent, 0.0, x * jax.lax.rsqrt(jnp.where(absent, 1.0, squares)))
