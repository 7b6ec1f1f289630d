"""AnchorDR, ExpandR's retriever: an encoder and one step of a decoder.

Its files call it T5, but it is post-norm, with biases, learned positions and scaled scores. A
text's vector is the decoder's state at its single input, the token <s>.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.models.decoder import token_positions
from expandr_jax.models.encoder import Encoder, EncoderBlock, LayerNorm
from expandr_jax.models.lora import LoraConfig
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.stack import parameter, stack
from expandr_jax.models.t5 import T5Config, feed_forward
from expandr_jax.sharding import constrain

_BOS = 0


@dataclasses.dataclass(frozen=True)
class AnchorDrConfig(T5Config):
    """T5's options for both stacks, which share the token table.

    All norms are layer norms, and a feed-forward that is not gated has biases.

    Attributes:
        num_decoder_layers: Blocks of the decoder; `num_layers` are the encoder's.
        max_distance: Tokens at this distance or beyond share the last bucket.
        pad_id: Positions count from the row after this one.
        max_positions: Longest input, in tokens.
    """

    num_decoder_layers: int = dataclasses.field(kw_only=True)
    max_distance: int = 127
    pad_id: int = 1
    max_positions: int = 1024


class Attention(EncoderBlock):
    """Multi-head attention from one sequence to another or to itself, all projections with bias."""

    @nn.compact
    def __call__(self, x, memory, mask, bias=None):
        return self.attention(x, memory, mask, self.config.dropout, bias=bias)


class Block(EncoderBlock):
    """One post-norm block; a decoder's (`is_decoder`) attends to the encoder's output too."""

    config: AnchorDrConfig
    is_decoder: bool

    @nn.compact
    def __call__(self, x, shared):
        cfg = self.config
        options = cfg, self.dtype, self.lora, self.deterministic
        mask, buckets, memory, memory_mask = shared
        bias = None
        if not self.is_decoder:
            shape = cfg.num_buckets, cfg.num_heads
            table = parameter(self, "relative_bias", ("buckets", "heads"), shape)
            bias = table[buckets].transpose(2, 0, 1)
        y = Attention(*options, name="self_attn")(x, x, mask, bias)
        x = self.add_and_norm("attention_norm", x, y, cfg.dropout)
        if self.is_decoder:
            y = Attention(*options, name="cross_attn")(x, memory, memory_mask)
            x = self.add_and_norm("cross_norm", x, y, cfg.dropout)
        y = feed_forward(self, x, bias=not cfg.gated)
        x = self.add_and_norm("mlp_norm", x, y, cfg.dropout)
        return constrain(x, ("batch", "length", "act_embed")), None


class Stack(nn.Module):
    """Embedded tokens through positions, the embedding norm and the blocks."""

    config: AnchorDrConfig
    dtype: Any
    remat: str
    lora: LoraConfig | None
    deterministic: bool
    is_decoder: bool

    @nn.compact
    def __call__(self, x, positions, shared):
        cfg = self.config
        shape = cfg.max_positions + cfg.pad_id + 1, cfg.hidden_size
        table = parameter(self, "position_embedding", ("positions", "embed"), shape)
        x = x + table[positions + cfg.pad_id + 1]
        x = constrain(x, ("batch", "length", "act_embed"))
        x = LayerNorm(cfg.norm_eps, name="embedding_norm")(x).astype(self.dtype)
        x = nn.Dropout(cfg.dropout)(x, deterministic=self.deterministic)

        length = cfg.num_decoder_layers if self.is_decoder else cfg.num_layers
        layers = stack(Block, length, self.remat)(
            cfg, self.dtype, self.lora, self.deterministic, self.is_decoder, name="layers"
        )
        return layers(x, shared)[0]


class AnchorDr(Encoder):
    """Token ids to the decoder's state at its first position, [batch, 1, hidden_size]."""

    config: AnchorDrConfig

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        cfg = self.config
        shape = cfg.vocab_size, cfg.hidden_size
        tokens = parameter(self, "embedding", ("vocab", "embed"), shape)
        options = cfg, self.dtype, self.remat, self.lora, deterministic
        mask = padding_mask(attention_mask).prepared(1)
        buckets = relative_buckets(input_ids.shape[1], cfg.num_buckets, cfg.max_distance)
        encoder = Stack(*options, is_decoder=False, name="encoder")
        memory = encoder(
            tokens[input_ids], token_positions(attention_mask), (mask, buckets, None, None)
        )
        first = jnp.broadcast_to(tokens[_BOS], (input_ids.shape[0], 1, cfg.hidden_size))
        itself = padding_mask(jnp.ones((input_ids.shape[0], 1), jnp.int32)).prepared(1)
        decoder = Stack(*options, is_decoder=True, name="decoder")
        return decoder(first, jnp.zeros((1, 1), jnp.int32), (itself, None, memory, mask))


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> jax.Array:
    """Buckets [length queries, length keys] int32 of the distances between tokens.

    The sign of a distance counts from the middle; near ones have a bucket of their own and far ones
    share buckets that widen logarithmically.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.arange(length)
    far = np.log(np.maximum(distance, exact) / exact) / np.log(max_distance / exact)
    far = exact + np.ceil(far * (half - 1 - exact))
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    ahead = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    return jnp.sign(ahead) * jnp.asarray(bucket, jnp.int32)[jnp.abs(ahead)] + half - 1
