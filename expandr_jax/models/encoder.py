"""What the encoders have in common: how they are called, and what their blocks are made of."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend
from expandr_jax.models.gelu import gelu
from expandr_jax.models.lora import Projection
from expandr_jax.models.mask import Mask

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


class Encoder(nn.Module):
    """Token ids to hidden states.

    Each encoder takes `input_ids` [batch, length] int32; `attention_mask` [batch, length], 1 for
    real tokens, with padding on either side; `deterministic`, where False applies dropout (rng
    "dropout"). It returns hidden states [batch, length, hidden_size] in the compute type.

    Attributes:
        config: The model's shape.
        dtype: Compute type; norms and softmax are float32 whatever it is.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
    """

    config: Any
    dtype: Any = jnp.float32
    remat: str = "none"

    def table(self, name: str, axes: tuple[str, str], rows: int, columns: int) -> jax.Array:
        """A parameter of embeddings, [rows, columns]."""
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
        return self.param(name, init, (rows, columns))


class EncoderBlock(nn.Module):
    """One block, in the form `nn.scan` wants: (carry, *inputs) -> (carry, None).

    Attributes:
        config: The model's shape.
        dtype: Compute type.
        deterministic: No dropout is applied.
    """

    config: Any
    dtype: Any
    deterministic: bool

    def project(self, name: str, features: int, axes: tuple[str, str], x: jax.Array, bias: bool):
        return Projection(features, axes, bias, self.dtype, name=name)(x)

    def drop(self, rate: float, x: jax.Array) -> jax.Array:
        return nn.Dropout(rate)(x, deterministic=self.deterministic)

    def project_heads(self, name: str, x: jax.Array, bias: bool) -> jax.Array:
        """[batch, length, hidden_size] to [batch, length, heads, head_dim]."""
        heads = self.config.num_heads, self.config.head_dim
        y = self.project(name, heads[0] * heads[1], ("embed", "heads"), x, bias)
        return y.reshape(*x.shape[:2], *heads)

    def attention(
        self,
        x: jax.Array,
        memory: jax.Array,
        mask: Mask,
        rate: float,
        *,
        use_bias: bool = True,
        scale: float | None = None,
        bias: jax.Array | None = None,
    ) -> jax.Array:
        """Multi-head attention, with its projections.

        Args:
            x: [batch, length, hidden_size].
            memory: What is attended to, [batch, keys, hidden_size].
            mask: Which of it each may attend to.
            rate: Of dropout on the attention weights.
            use_bias: The projections have biases.
            scale: Factor on the scores; None: head_dim ** -0.5.
            bias: [heads, length, keys], added to the scores.
        """
        q, k, v = (
            self.project_heads(name, y, use_bias)
            for name, y in (("q_proj", x), ("k_proj", memory), ("v_proj", memory))
        )
        scale = self.config.head_dim**-0.5 if scale is None else scale
        out = attend(q, k, v, mask, scale=scale, bias=bias, dropout=self.weights_dropout(rate))
        return self.project_out(out, use_bias)

    def weights_dropout(self, rate: float) -> nn.Dropout | None:
        """What `attend` applies to the attention weights."""
        applied = not self.deterministic and rate > 0
        return nn.Dropout(rate, deterministic=False) if applied else None

    def project_out(self, x: jax.Array, bias: bool) -> jax.Array:
        """[batch, length, heads, head_dim] to [batch, length, hidden_size]."""
        x = x.reshape(*x.shape[:2], -1)
        return self.project("o_proj", self.config.hidden_size, ("heads", "embed"), x, bias)


class LayerNorm(nn.Module):
    """Layer normalisation with a scale and, where `use_bias`, a bias, in float32."""

    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        width = (x.shape[-1],)
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("norm",)), width)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * scale.astype(jnp.float32)
        if self.use_bias:
            bias = self.param("bias", nn.with_logical_partitioning(zeros, ("norm",)), width)
            y = y + bias.astype(jnp.float32)
        return y.astype(x.dtype)
