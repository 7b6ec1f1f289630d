"""Frozen weights in 8 or 4 bits: how they are kept, and products with them.

In "int8" a weight is a whole number times a scale for each output. In "int4" and "nf4" each
`BLOCK_SIZE` inputs of an output share a scale: the number is one of 15 steps of equal width, or one
of NF4's 16 levels (QLoRA, Dettmers et al., arXiv 2305.14314), which lie closer together where a
normal distribution has more weights. Two of them are a byte. With their scales in float32 they take
4.5 bits a weight.

qwix (0.1.8) has all three, and is what tests compare with. It is not used here: its numbers of 4
bits take a byte each on the host and on CPUs, its product in int8 writes all of W out in float32
and multiplies so, and in NF4 it finds each level by a gather. What its products leave for the
backward pass is the weight written out, which a stack of layers would add up; here it is the bits,
and the weight is written out again.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.errors import UserError

QUANTIZED_TYPES = ("int8", "int4", "nf4")
BLOCK_SIZE = 64  # Inputs that share a scale, as in QLoRA.
# Appendix E of QLoRA: quantiles of a normal distribution, brought to -1 .. 1, with a 0 among them.
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
_MIDDLES = ((NF4[1:].astype(np.float64) + NF4[:-1]) / 2).astype(np.float32)
_INT8, _INT4 = 127, 7.5  # What a block's or an output's largest weight becomes.
_MIDDLE, _GREATEST = 8, 7  # What stands for 0 in int4, and the most steps either side of it.


def block_of(inputs: int) -> int:
    """How many of `inputs` share a scale in 4 bits: `BLOCK_SIZE`, or as many as divide them."""
    return math.gcd(inputs, BLOCK_SIZE)


def kept_in(module: nn.Module, weights: str, where: str) -> tuple[nn.Module, Any]:
    """A decoder whose frozen weights are kept as a config says, and the type of its other ones.

    Args:
        module: As it is with weights of a floating type.
        weights: One of `QUANTIZED_TYPES`, or a floating type.
        where: What errors are of.

    Raises:
        UserError: The module cannot have its weights in this form.
    """
    if weights not in QUANTIZED_TYPES:
        return module, jnp.dtype(weights)
    config = module.config
    if not hasattr(config, "quantized"):
        raise UserError(f"{where}: weights in {weights} are for decoders only")
    widths = config.hidden_size, config.mlp_dim, config.num_heads * config.head_dim
    if weights != "int8" and any(width % 2 for width in widths):
        raise UserError(f"{where}: weights in {weights} want even widths; the model's are {widths}")
    return module.clone(config=dataclasses.replace(config, quantized=weights)), module.dtype


def kept_shapes(form: str, inputs: int, outputs: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what is kept of a weight [inputs, outputs], and of its scales."""
    if form == "int8":
        return (inputs, outputs), (outputs,)
    return (inputs // 2, outputs), (inputs // block_of(inputs), outputs)


def kept_type(form: str) -> np.dtype:
    return np.dtype(np.int8 if form == "int8" else np.uint8)


def is_quantized(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array of a parameter tree is a weight in one of the forms."""
    return leaf.dtype in (jnp.int8, jnp.uint8)


def whole_shape(leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape [..., inputs, outputs] of a weight, in one of the forms or as numbers."""
    *stack, inputs, outputs = leaf.shape
    return (*stack, inputs * (2 if leaf.dtype == jnp.uint8 else 1), outputs)


def quantize(form: str, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [..., inputs, outputs] float32 in a form: what is kept of them, and their scales."""
    tiny = np.finfo(np.float32).tiny
    if form == "int8":
        scale = np.maximum(np.abs(weights).max(axis=-2) / _INT8, tiny)
        return np.rint(weights / scale[..., None, :]).astype(np.int8), scale
    *stack, inputs, outputs = weights.shape
    blocks = weights.reshape(*stack, -1, block_of(inputs), outputs)
    scale = np.maximum(np.abs(blocks).max(axis=-2), tiny)
    if form == "nf4":
        shares = blocks / scale[..., None, :]
        codes = np.zeros(shares.shape, np.uint8)
        for middle in _MIDDLES:  # Several times as quick as a search in each number's place.
            codes += shares > middle
    else:
        scale = scale / np.float32(_INT4)
        steps = np.rint(blocks / scale[..., None, :])
        codes = (np.clip(steps, -_GREATEST, _GREATEST) + _MIDDLE).astype(np.uint8)
    low, high = np.split(codes, 2, axis=-2)
    return (low | high << 4).reshape(*stack, inputs // 2, outputs), scale


def dequantize(form: str, kept: jax.Array, scale: jax.Array) -> jax.Array:
    """The weights [inputs, outputs] in float32 that `quantize` has made a form of."""
    if form == "int8":
        return kept.astype(jnp.float32) * scale
    blocks = len(scale)
    # The two of a byte are half a block apart, so that nothing is interleaved.
    kept = kept.reshape(blocks, -1, kept.shape[-1])
    codes = jnp.concatenate([kept & 15, kept >> 4], axis=1)
    values = _levels(codes) if form == "nf4" else codes.astype(jnp.float32) - _MIDDLE
    return (values * scale[:, None]).reshape(-1, kept.shape[-1])


def _levels(codes: jax.Array) -> jax.Array:
    """NF4's levels, chosen by one bit of their numbers after the other."""
    values = list(map(jnp.float32, NF4))
    for bit in range(4):
        is_set = (codes >> bit & 1).astype(bool)
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, odd, even) for even, odd in pairs]
    return values[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def quantized_product(form: str, x: jax.Array, kept: jax.Array, scale: jax.Array) -> jax.Array:
    """The product [..., outputs] of x [..., inputs] and frozen weights, in x's type.

    Gradients are for `x` alone, and only the bits are kept for them.
    """
    if form == "int8":
        # Whole numbers up to 127 are exact in any of the compute types.
        y = jnp.dot(x, kept.astype(x.dtype), preferred_element_type=jnp.float32)
        return (y * scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)
    return jnp.dot(x, dequantize(form, kept, scale).astype(x.dtype))


def _forward(form: str, x: jax.Array, kept: jax.Array, scale: jax.Array):
    return quantized_product(form, x, kept, scale), (kept, scale)


def _backward(form: str, bits: tuple[jax.Array, jax.Array], grad: jax.Array):
    kept, scale = bits
    if form == "int8":
        grad, weights = (grad.astype(jnp.float32) * scale).astype(grad.dtype), kept
    else:
        weights = dequantize(form, kept, scale)
    return jnp.dot(grad, weights.astype(grad.dtype).T), None, None


quantized_product.defvjp(_forward, _backward)
