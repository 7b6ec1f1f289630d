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
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.stack import stack
from expandr_jax.models.t5 import feed_forward
from expandr_jax.sharding import constrain

_BOS = 0
FARTHEST = 127  # Tokens at this distance or beyond share the last bucket.


@dataclasses.dataclass(frozen=True)
class AnchorDrConfig:
    """Shape and options of both stacks.

    Attributes:
        vocab_size: Rows of the token table, which both stacks share.
        hidden_size: Width of the residual stream.
        num_layers: Blocks of the encoder.
        num_decoder_layers: Blocks of the decoder.
        num_heads: Attention heads.
        mlp_dim: Inner width of the feed-forward.
        gated: The feed-forward is gelu(x W_0) * (x W_1) without biases and not relu(x W + b).
        num_buckets: Buckets of relative distance, half of them for each direction.
        pad_id: Positions count from the row after this one.
        norm_eps: Epsilon of the layer norms.
        dropout: Rate of dropout everywhere.
        max_positions: Longest input, in tokens.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    mlp_dim: int
    gated: bool = False
    num_buckets: int = 32
    pad_id: int = 1
    norm_eps: float = 1e-6
    dropout: float = 0.1
    max_positions: int = 1024

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


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
        options = cfg, self.dtype, self.deterministic
        mask, buckets, memory, memory_mask = shared
        bias = None
        if not self.is_decoder:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("buckets", "heads"))
            table = self.param("relative_bias", init, (cfg.num_buckets, cfg.num_heads))
            bias = table[buckets].transpose(2, 0, 1)
        y = Attention(*options, name="self_attn")(x, x, mask, bias)
        x = self._norm("attention_norm", x, y)
        if self.is_decoder:
            y = Attention(*options, name="cross_attn")(x, memory, memory_mask)
            x = self._norm("cross_norm", x, y)
        x = self._norm("mlp_norm", x, feed_forward(self, x, bias=not cfg.gated))
        return constrain(x, ("batch", "length", "act_embed")), None

    def _norm(self, name, x, y):
        cfg = self.config
        return LayerNorm(cfg.norm_eps, name=name)(x + self.drop(cfg.dropout, y))


class Stack(nn.Module):
    """Embedded tokens through positions, the embedding norm and the blocks."""

    config: AnchorDrConfig
    dtype: Any
    remat: str
    deterministic: bool
    is_decoder: bool

    @nn.compact
    def __call__(self, x, positions, shared):
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("positions", "embed"))
        shape = cfg.max_positions + cfg.pad_id + 1, cfg.hidden_size
        x = x + self.param("position_embedding", init, shape)[positions + cfg.pad_id + 1]
        x = constrain(x, ("batch", "length", "act_embed"))
        x = LayerNorm(cfg.norm_eps, name="embedding_norm")(x).astype(self.dtype)
        x = nn.Dropout(cfg.dropout)(x, deterministic=self.deterministic)

        length = cfg.num_decoder_layers if self.is_decoder else cfg.num_layers
        layers = stack(Block, length, self.remat)(
            cfg, self.dtype, self.deterministic, self.is_decoder, name="layers"
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
        tokens = self.table("embedding", ("vocab", "embed"), cfg.vocab_size, cfg.hidden_size)
        options = cfg, self.dtype, self.remat, deterministic
        mask = padding_mask(attention_mask).prepared(1)
        buckets = relative_buckets(input_ids.shape[1], cfg.num_buckets)
        encoder = Stack(*options, is_decoder=False, name="encoder")
        memory = encoder(
            tokens[input_ids], token_positions(attention_mask), (mask, buckets, None, None)
        )
        first = jnp.broadcast_to(tokens[_BOS], (input_ids.shape[0], 1, cfg.hidden_size))
        itself = padding_mask(jnp.ones((input_ids.shape[0], 1), jnp.int32)).prepared(1)
        decoder = Stack(*options, is_decoder=True, name="decoder")
        return decoder(first, jnp.zeros((1, 1), jnp.int32), (itself, None, memory, mask))


def relative_buckets(length: int, num_buckets: int) -> jax.Array:
    """Buckets [length queries, length keys] int32 of the distances between tokens.

    The sign of a distance counts from the middle; near ones have a bucket of their own and far ones
    share buckets that widen logarithmically.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.arange(length)
    far = np.log(np.maximum(distance, exact) / exact) / np.log(FARTHEST / exact)
    far = exact + np.ceil(far * (half - 1 - exact))
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1))
    ahead = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    return jnp.sign(ahead) * jnp.asarray(bucket, jnp.int32)[jnp.abs(ahead)] + half - 1
