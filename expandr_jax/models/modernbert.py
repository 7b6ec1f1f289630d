"""ModernBERT (arXiv 2412.13663): an encoder with rotary positions, some layers of which look near.

Pre-norm blocks under `nn.scan`. The first stands apart: the embeddings' norm takes the place of its
own, which no file holds.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend
from expandr_jax.models.bert import ACTIVATIONS, LayerNorm
from expandr_jax.models.decoder import token_positions
from expandr_jax.models.lora import Projection
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.rope import RopeScaling, apply_rope, rope_angles
from expandr_jax.models.stack import stack
from expandr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Shape and options of an encoder.

    Attributes:
        vocab_size: Rows of the token table.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        mlp_dim: Inner width of the gated feed-forward.
        max_positions: Longest input the model was made for, in tokens.
        window: Local layers see the tokens nearer than so many positions, on either side.
        layer_is_local: For each layer, whether it attends locally.
        activation: A key of `bert.ACTIVATIONS`, on the gate.
        norm_eps: Epsilon of the layer norms.
        norm_bias: The norms have biases.
        attention_bias: The projections of attention have biases.
        mlp_bias: Those of the feed-forward have.
        rope_theta: Base of the rotary frequencies in global layers.
        rope_scaling: How those frequencies are stretched, if they are.
        rope_local_theta: The base in local layers.
        rope_local_scaling: The stretching in local layers.
        embedding_dropout: Rate of dropout after the embeddings.
        attention_dropout: Rate on the attention weights, and on what attention gives.
        mlp_dropout: Rate within the feed-forward.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    max_positions: int
    window: int
    layer_is_local: tuple[bool, ...]
    activation: str = "gelu"
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 160_000.0
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float = 10_000.0
    rope_local_scaling: RopeScaling | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0


class Block(nn.Module):
    """One block, in the form `nn.scan` wants: (carry, is_local, shared) -> (carry, None).

    Products that a file keeps in one tensor are one here: queries, keys and values; both halves of
    the feed-forward's entry. A mesh's "tensor" axis splits their outputs after the product.
    """

    config: ModernBertConfig
    dtype: Any
    deterministic: bool
    is_first: bool = False

    @nn.compact
    def __call__(self, x, is_local, shared):
        y = x if self.is_first else self._norm("attention_norm", x)
        x = x + self._attention(y, is_local, shared)
        x = x + self._mlp(self._norm("mlp_norm", x))
        return constrain(x, ("batch", "length", "act_embed")), None

    def _attention(self, x, is_local, shared):
        cfg = self.config
        mask, ropes = shared
        rope = jax.tree.map(lambda near, far: jnp.where(is_local, near, far), *ropes)
        qkv = self._project("qkv_proj", 3 * cfg.hidden_size, ("embed", "heads"), x)
        q, k, v = (
            part.reshape(*x.shape[:2], cfg.num_heads, -1) for part in jnp.split(qkv, 3, axis=-1)
        )
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        dropout = None
        if not self.deterministic and cfg.attention_dropout > 0:
            dropout = nn.Dropout(cfg.attention_dropout, deterministic=False)
        mask = mask.replace(windowed=is_local)
        out = attend(q, k, v, mask, scale=q.shape[-1] ** -0.5, dropout=dropout).reshape(x.shape)
        out = self._project("o_proj", cfg.hidden_size, ("heads", "embed"), out)
        return self._drop(cfg.attention_dropout, out)

    def _mlp(self, x):
        cfg = self.config
        y = self._project("gate_up_proj", 2 * cfg.mlp_dim, ("embed", "mlp"), x, cfg.mlp_bias)
        gate, up = jnp.split(y, 2, axis=-1)
        y = self._drop(cfg.mlp_dropout, ACTIVATIONS[cfg.activation](gate) * up)
        return self._project("down_proj", cfg.hidden_size, ("mlp", "embed"), y, cfg.mlp_bias)

    def _project(self, name, features, axes, x, bias=None):
        bias = self.config.attention_bias if bias is None else bias
        return Projection(features, axes, bias, self.dtype, name=name)(x)

    def _norm(self, name, x):
        return LayerNorm(self.config.norm_eps, self.config.norm_bias, name=name)(x)

    def _drop(self, rate, x):
        return nn.Dropout(rate)(x, deterministic=self.deterministic)


class ModernBert(nn.Module):
    """Token ids to hidden states.

    Attributes:
        config: The model's shape.
        dtype: Compute type; norms and softmax are float32 whatever it is.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
    """

    config: ModernBertConfig
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        """Encodes a batch.

        Args:
            input_ids: [batch, length] int32.
            attention_mask: [batch, length], 1 for real tokens; padding may be on either side.
            deterministic: False applies dropout (rng "dropout").

        Returns:
            Hidden states [batch, length, hidden_size] in the compute type.
        """
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        x = self.param("embedding", init, (cfg.vocab_size, cfg.hidden_size))[input_ids]
        x = constrain(x, ("batch", "length", "act_embed"))
        x = self._norm("embedding_norm", x).astype(self.dtype)
        x = nn.Dropout(cfg.embedding_dropout)(x, deterministic=deterministic)

        positions = token_positions(attention_mask)
        mask = padding_mask(attention_mask).prepared(x.shape[1])
        if any(cfg.layer_is_local):
            mask = mask.within(cfg.window, positions, positions)
        bases = (
            (cfg.rope_local_theta, cfg.rope_local_scaling),
            (cfg.rope_theta, cfg.rope_scaling),
        )
        width = cfg.hidden_size // cfg.num_heads
        shared = mask, tuple(rope_angles(positions, width, *base) for base in bases)
        options = cfg, self.dtype, deterministic
        is_local = jnp.asarray(cfg.layer_is_local)
        for name, first, count in (("first_layer", True, 1), ("layers", False, cfg.num_layers - 1)):
            if count:
                run = stack(Block, count, self.remat, (0, nn.broadcast))(*options, first, name=name)
                x, _ = run(x, is_local[:1] if first else is_local[1:], shared)
        return self._norm("final_norm", x)

    def _norm(self, name, x):
        return LayerNorm(self.config.norm_eps, self.config.norm_bias, name=name)(x)
