"""What the encoders have in common: how they are called, and what their blocks are made of."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend
from expandr_jax.models.gelu import gelu
from expandr_jax.models.lora import LoraConfig, Projection
from expandr_jax.models.mask import Mask
from expandr_jax.models.stack import TransformerConfig, parameter

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
        lora: Settings for the "lora" collection, if one is passed.
    """

    config: TransformerConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: LoraConfig | None = None

    @staticmethod
    def inputs(input_ids: jax.Array, attention_mask: jax.Array) -> tuple[Any, ...]:
        """The arguments of `__call__` for a batch of texts."""
        return input_ids, attention_mask


class EncoderBlock(nn.Module):
    """One block, in the form `nn.scan` wants: (carry, *inputs) -> (carry, None).

    Attributes:
        config: The model's shape.
        dtype: Compute type.
        lora: Settings for the "lora" collection, if one is passed.
        deterministic: No dropout is applied.
    """

    config: TransformerConfig
    dtype: Any
    lora: LoraConfig | None
    deterministic: bool

    def project(self, name: str, features: int, axes: tuple[str, str], x: jax.Array, bias: bool):
        projection = Projection(features, axes, bias, self.dtype, self.lora, name=name)
        return projection(x, self.deterministic)

    def drop(self, rate: float, x: jax.Array) -> jax.Array:
        return nn.Dropout(rate)(x, deterministic=self.deterministic)

    def add_and_norm(self, name: str, x: jax.Array, y: jax.Array, rate: float) -> jax.Array:
        """The residual sum of a post-norm block."""
        return LayerNorm(self.config.norm_eps, name=name)(x + self.drop(rate, y))

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
        """Multi-head attention of x, [batch, length, hidden_size], with its projections.

        What is attended to is `memory`, [batch, keys, hidden_size], and `rate` is that of dropout
        on the attention weights. With `use_bias` the projections have biases; `bias` and `scale`
        are those of `attend`, the latter by default head_dim ** -0.5.
        """
        heads = self.config.num_heads, self.config.head_dim
        q, k, v = (
            self.project(name, math.prod(heads), ("embed", "heads"), y, use_bias).reshape(
                *y.shape[:2], *heads
            )
            for name, y in (("q_proj", x), ("k_proj", memory), ("v_proj", memory))
        )
        scale = self.config.head_dim**-0.5 if scale is None else scale
        out = attend(q, k, v, mask, scale=scale, bias=bias, dropout=self.weights_dropout(rate))
        return self.project_out(out, use_bias)

    def weights_dropout(self, rate: float) -> nn.Dropout | None:
        """Dropout of the attention weights, as `attend` applies it."""
        applied = not self.deterministic and rate > 0
        return nn.Dropout(rate, deterministic=False) if applied else None

    def project_out(self, x: jax.Array, bias: bool) -> jax.Array:
        """[batch, length, heads, head_dim] to [batch, length, hidden_size]."""
        x = x.reshape(*x.shape[:2], -1)
        return self.project("o_proj", self.config.hidden_size, ("heads", "embed"), x, bias)


class HeadLayer(nn.Module):
    """A product with a kernel and, where `use_bias`, a bias: a layer of what stands on an encoder.

    Attributes:
        features: Width of what it gives.
        use_bias: Whether there is one.
        axis: The name of that width, by which it is spread over a mesh.
    """

    features: int
    use_bias: bool = True
    axis: str = "heads"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = parameter(self, "kernel", ("embed", self.axis), (x.shape[-1], self.features))
        y = x @ kernel.astype(x.dtype)
        if self.use_bias:
            bias = parameter(self, "bias", (self.axis,), (self.features,), nn.initializers.zeros)
            y = y + bias.astype(x.dtype)
        return y


class LayerNorm(nn.Module):
    """Layer normalisation with a scale and, where `use_bias`, a bias, in float32."""

    eps: float
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        form = ("norm",), (x.shape[-1],)
        scale = parameter(self, "scale", *form, nn.initializers.ones)
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * scale.astype(jnp.float32)
        if self.use_bias:
            y = y + parameter(self, "bias", *form, nn.initializers.zeros).astype(jnp.float32)
        return y.astype(x.dtype)
