"""Rotary position embeddings (RoFormer, arXiv 2104.09864), half-split as in Hugging Face."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched beyond the length a model was pre-trained on.

    Attributes:
        kind: "linear" divides every frequency by `factor`; "llama3" only the low ones.
        factor: The stretch.
        low_freq_factor: Wavelengths above original_positions / this are stretched fully (llama3).
        high_freq_factor: Wavelengths below original_positions / this are kept (llama3).
        original_positions: Length of pre-training, in tokens (llama3).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192


def rope_angles(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, [batch, length, head_dim / 2] float32 each, of [batch, length]."""
    frequency = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        frequency = scale_frequencies(frequency, scaling)
    angles = positions[..., None].astype(jnp.float32) * frequency[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def scale_frequencies(frequency: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Stretches rotary frequencies, [head_dim / 2] each."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_positions * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def apply_rope(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates x [batch, length, heads, head_dim] in float32; returns x's type."""
    cos, sin = (part[:, :, None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
