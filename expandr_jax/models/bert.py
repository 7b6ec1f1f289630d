"""BERT (arXiv 1810.04805) and its kin: RoBERTa, XLM-RoBERTa, CamemBERT. Blocks are post-norm."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.decoder import token_positions
from expandr_jax.models.encoder import ACTIVATIONS, Encoder, EncoderBlock, LayerNorm
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.stack import TransformerConfig, parameter, stack
from expandr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class BertConfig(TransformerConfig):
    """Options of an encoder.

    Attributes:
        max_positions: Longest input, in tokens.
        position_offset: Row of the position table that the first token takes (RoBERTa: pad id + 1).
        num_token_types: Rows of the token type table.
        activation: A key of `encoder.ACTIVATIONS`.
        norm_eps: Epsilon of the layer norms.
        hidden_dropout: Rate of dropout after the embeddings and before each residual sum.
        attention_dropout: Rate of dropout on the attention weights.
    """

    max_positions: int
    position_offset: int = 0
    num_token_types: int = 2
    activation: str = "gelu"
    norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class Block(EncoderBlock):
    """(carry, mask) -> (carry, None)."""

    config: BertConfig

    @nn.compact
    def __call__(self, x, mask):
        cfg = self.config
        y = self.attention(x, x, mask, cfg.attention_dropout)
        x = self.add_and_norm("attention_norm", x, y, cfg.hidden_dropout)
        y = self.project("up_proj", cfg.mlp_dim, ("embed", "mlp"), x, True)
        y = ACTIVATIONS[cfg.activation](y)
        y = self.project("down_proj", cfg.hidden_size, ("mlp", "embed"), y, True)
        x = self.add_and_norm("mlp_norm", x, y, cfg.hidden_dropout)
        return constrain(x, ("batch", "length", "act_embed")), None


class Bert(Encoder):
    """Token ids to hidden states; `token_types` [batch, length] int32: None means all are 0."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        cfg = self.config

        def table(name, rows, axis):
            return parameter(self, name, (axis, "embed"), (rows, cfg.hidden_size))

        tokens = table("embedding", cfg.vocab_size, "vocab")
        places = table("position_embedding", cfg.max_positions + cfg.position_offset, "positions")
        types = table("type_embedding", cfg.num_token_types, "token_types")
        if cfg.position_offset:
            # RoBERTa counts the ids that are not its pad id, wherever they stand; that id itself
            # takes the row before the first.
            counted = attention_mask * (input_ids != cfg.position_offset - 1)
            positions = jnp.cumsum(counted, axis=1) * counted + cfg.position_offset - 1
        else:
            positions = token_positions(attention_mask)
        x = tokens[input_ids] + types[0 if token_types is None else token_types] + places[positions]
        x = constrain(x, ("batch", "length", "act_embed"))
        x = LayerNorm(cfg.norm_eps, name="embedding_norm")(x).astype(self.dtype)
        x = nn.Dropout(cfg.hidden_dropout)(x, deterministic=deterministic)

        layers = stack(Block, cfg.num_layers, self.remat)(
            cfg, self.dtype, self.lora, deterministic, name="layers"
        )
        return layers(x, padding_mask(attention_mask).prepared(x.shape[1]))[0]
