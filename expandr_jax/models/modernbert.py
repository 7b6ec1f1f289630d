"""ModernBERT (arXiv 2412.13663): an encoder with rotary positions, some layers of which look near.

Blocks are pre-norm. The first stands apart: the embeddings' norm takes the place of its own, which
no file holds.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend
from expandr_jax.models.decoder import token_positions
from expandr_jax.models.encoder import ACTIVATIONS, Encoder, EncoderBlock, LayerNorm
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.rope import RopeScaling, apply_rope, rope_angles
from expandr_jax.models.stack import TransformerConfig, parameter, stack
from expandr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ModernBertConfig(TransformerConfig):
    """Options of an encoder; its feed-forward is gated.

    Attributes:
        max_positions: Longest input the model was made for, in tokens.
        window: Local layers see the tokens nearer than so many positions, on either side.
        layer_is_local: For each layer, whether it attends locally.
        activation: A key of `encoder.ACTIVATIONS`, on the gate.
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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class Block(EncoderBlock):
    """(carry, is_local, (mask, rotary angles)) -> (carry, None).

    Products that a file keeps in one tensor are one here: queries, keys and values; both halves of
    the feed-forward's entry. A mesh's "tensor" axis splits their outputs after the product.
    """

    config: ModernBertConfig
    is_first: bool = False

    @nn.compact
    def __call__(self, x, is_local, shared):
        y = x if self.is_first else _norm(self.config, "attention_norm", x)
        x = x + self._attention(y, is_local, shared)
        x = x + self._mlp(_norm(self.config, "mlp_norm", x))
        return constrain(x, ("batch", "length", "act_embed")), None

    def _attention(self, x, is_local, shared):
        cfg = self.config
        mask, ropes = shared
        rope = jax.tree.map(lambda near, far: jnp.where(is_local, near, far), *ropes)
        qkv = self.project(
            "qkv_proj", 3 * cfg.hidden_size, ("embed", "heads"), x, cfg.attention_bias
        )
        q, k, v = (
            part.reshape(*x.shape[:2], cfg.num_heads, -1) for part in jnp.split(qkv, 3, axis=-1)
        )
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        dropout, mask = self.weights_dropout(cfg.attention_dropout), mask.replace(windowed=is_local)
        out = attend(q, k, v, mask, scale=cfg.head_dim**-0.5, dropout=dropout)
        return self.drop(cfg.attention_dropout, self.project_out(out, cfg.attention_bias))

    def _mlp(self, x):
        cfg = self.config
        y = self.project("gate_up_proj", 2 * cfg.mlp_dim, ("embed", "mlp"), x, cfg.mlp_bias)
        gate, up = jnp.split(y, 2, axis=-1)
        y = self.drop(cfg.mlp_dropout, ACTIVATIONS[cfg.activation](gate) * up)
        return self.project("down_proj", cfg.hidden_size, ("mlp", "embed"), y, cfg.mlp_bias)


def _norm(config, name, x):
    return LayerNorm(config.norm_eps, config.norm_bias, name=name)(x)


class ModernBert(Encoder):
    """Token ids to hidden states."""

    config: ModernBertConfig

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        cfg = self.config
        shape = cfg.vocab_size, cfg.hidden_size
        tokens = parameter(self, "embedding", ("vocab", "embed"), shape)
        x = constrain(tokens[input_ids], ("batch", "length", "act_embed"))
        x = _norm(cfg, "embedding_norm", x).astype(self.dtype)
        x = nn.Dropout(cfg.embedding_dropout)(x, deterministic=deterministic)

        positions = token_positions(attention_mask)
        mask = padding_mask(attention_mask).prepared(x.shape[1])
        if any(cfg.layer_is_local):
            mask = mask.within(cfg.window, positions, positions)
        bases = (
            (cfg.rope_local_theta, cfg.rope_local_scaling),
            (cfg.rope_theta, cfg.rope_scaling),
        )
        shared = mask, tuple(rope_angles(positions, cfg.head_dim, *base) for base in bases)
        options = cfg, self.dtype, self.lora, deterministic
        is_local = jnp.asarray(cfg.layer_is_local)
        for name, first, count in (("first_layer", True, 1), ("layers", False, cfg.num_layers - 1)):
            if count:
                run = stack(Block, count, self.remat, (0, nn.broadcast))(*options, first, name=name)
                x, _ = run(x, is_local[:1] if first else is_local[1:], shared)
        return _norm(cfg, "final_norm", x)
