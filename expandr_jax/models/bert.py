"""BERT (arXiv 1810.04805) and its kin: RoBERTa, XLM-RoBERTa, CamemBERT.

Post-norm blocks under `nn.scan`: a layer's parameters are stacked along a leading "layers" axis.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend
from expandr_jax.models.decoder import token_positions
from expandr_jax.models.gelu import gelu
from expandr_jax.models.lora import Projection
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.stack import stack
from expandr_jax.sharding import constrain

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape and options of an encoder.

    Attributes:
        vocab_size: Rows of the token table.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        mlp_dim: Inner width of the feed-forward.
        max_positions: Longest input, in tokens.
        position_offset: Row of the position table that the first token takes (RoBERTa: pad id + 1).
        num_token_types: Rows of the token type table.
        activation: A key of `ACTIVATIONS`.
        norm_eps: Epsilon of the layer norms.
        hidden_dropout: Rate of dropout after the embeddings and before each residual sum.
        attention_dropout: Rate of dropout on the attention weights.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int
    position_offset: int = 0
    num_token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1


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


class Block(nn.Module):
    """One encoder block, in the form `nn.scan` wants: (carry, mask) -> (carry, None)."""

    config: BertConfig
    dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, x, mask):
        x = self._norm("attention_norm", x, self._attention(x, mask))
        y = self._project("up_proj", self.config.mlp_dim, ("embed", "mlp"), x)
        y = ACTIVATIONS[self.config.activation](y)
        y = self._project("down_proj", self.config.hidden_size, ("mlp", "embed"), y)
        x = self._norm("mlp_norm", x, y)
        return constrain(x, ("batch", "length", "act_embed")), None

    def _attention(self, x, mask):
        cfg = self.config
        heads = (*x.shape[:2], cfg.num_heads, cfg.hidden_size // cfg.num_heads)
        q, k, v = (
            self._project(name, cfg.hidden_size, ("embed", "heads"), x).reshape(heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        dropout = None
        if not self.deterministic and cfg.attention_dropout > 0:
            dropout = nn.Dropout(cfg.attention_dropout, deterministic=False)
        out = attend(q, k, v, mask, scale=heads[-1] ** -0.5, dropout=dropout).reshape(x.shape)
        return self._project("o_proj", cfg.hidden_size, ("heads", "embed"), out)

    def _project(self, name, features, axes, x):
        layer = Projection(features, axes, True, self.dtype, name=name)
        return layer(x)

    def _norm(self, name, x, y):
        y = nn.Dropout(self.config.hidden_dropout)(y, deterministic=self.deterministic)
        return LayerNorm(self.config.norm_eps, name=name)(x + y)


class Bert(nn.Module):
    """Token ids to hidden states.

    Attributes:
        config: The model's shape.
        dtype: Compute type; norms and softmax are float32 whatever it is.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        """Encodes a batch.

        Args:
            input_ids: [batch, length] int32.
            attention_mask: [batch, length], 1 for real tokens; padding may be on either side.
            token_types: [batch, length] int32 rows of the type table; None: all are of type 0.
            deterministic: False applies dropout (rng "dropout").

        Returns:
            Hidden states [batch, length, hidden_size] in the compute type.
        """
        cfg = self.config

        def table(name, rows, axis):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "embed"))
            return self.param(name, init, (rows, cfg.hidden_size))

        tokens = table("embedding", cfg.vocab_size, "vocab")
        places = table("position_embedding", cfg.max_positions + cfg.position_offset, "positions")
        types = table("type_embedding", cfg.num_token_types, "token_types")
        positions = token_positions(attention_mask) + cfg.position_offset
        x = tokens[input_ids] + types[0 if token_types is None else token_types] + places[positions]
        x = constrain(x, ("batch", "length", "act_embed"))
        x = LayerNorm(cfg.norm_eps, name="embedding_norm")(x).astype(self.dtype)
        x = nn.Dropout(cfg.hidden_dropout)(x, deterministic=deterministic)

        layers = stack(Block, cfg.num_layers, self.remat)(
            cfg, self.dtype, deterministic, name="layers"
        )
        return layers(x, padding_mask(attention_mask).prepared(x.shape[1]))[0]
