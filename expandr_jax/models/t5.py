"""The encoder of T5 (arXiv 1910.10683), as GTR and sentence-T5 use it.

Blocks are pre-norm; positions enter only as a bias on the scores, by bucket of distance, from a
table that all layers share.
"""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.models.decoder import RMSNorm
from expandr_jax.models.encoder import Encoder, EncoderBlock
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.stack import TransformerConfig, parameter, stack
from expandr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class T5Config(TransformerConfig):
    """Options of a T5 encoder.

    Attributes:
        head_dim: Width of one head; num_heads * head_dim need not be hidden_size.
        gated: The feed-forward is gelu(x W_0) * (x W_1) (T5 1.1) and not relu(x W).
        num_buckets: Buckets of relative distance, half of them for each direction.
        max_distance: Farther tokens share the last bucket.
        norm_eps: Epsilon of the root-mean-square norms.
        dropout: Rate of dropout everywhere.
        max_positions: None: relative positions set no limit.
    """

    head_dim: int
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1
    max_positions: None = None


class Block(EncoderBlock):
    """(carry, (mask, bias)) -> (carry, None)."""

    config: T5Config

    @nn.compact
    def __call__(self, x, shared):
        cfg = self.config
        mask, bias = shared
        y = RMSNorm(cfg.norm_eps, False, name="input_norm")(x)
        # T5 does not scale its scores: its initialisation does.
        options = {"use_bias": False, "scale": 1.0, "bias": bias}
        x = x + self.drop(cfg.dropout, self.attention(y, y, mask, cfg.dropout, **options))
        y = feed_forward(self, RMSNorm(cfg.norm_eps, False, name="mlp_norm")(x), False)
        return constrain(x + self.drop(cfg.dropout, y), ("batch", "length", "act_embed")), None


def feed_forward(block: EncoderBlock, x: jax.Array, bias: bool) -> jax.Array:
    """The feed-forward of a block, plain or gated by its config, with biases or without."""
    cfg = block.config
    up = block.project("up_proj", cfg.mlp_dim, ("embed", "mlp"), x, bias)
    if cfg.gated:
        gate = block.project("gate_proj", cfg.mlp_dim, ("embed", "mlp"), x, bias)
        y = nn.gelu(gate, approximate=True) * up
    else:
        y = nn.relu(up)
    y = block.drop(cfg.dropout, y)
    return block.project("down_proj", cfg.hidden_size, ("mlp", "embed"), y, bias)


class T5Encoder(Encoder):
    """Token ids to hidden states."""

    config: T5Config

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        cfg = self.config
        shape = cfg.vocab_size, cfg.hidden_size
        tokens = parameter(self, "embedding", ("vocab", "embed"), shape)
        shape = cfg.num_buckets, cfg.num_heads
        distances = parameter(self, "relative_bias", ("buckets", "heads"), shape)
        buckets = relative_buckets(input_ids.shape[1], cfg.num_buckets, cfg.max_distance)
        mask = padding_mask(attention_mask).prepared(input_ids.shape[1])
        shared = mask, distances[buckets].transpose(2, 0, 1)
        x = constrain(tokens[input_ids].astype(self.dtype), ("batch", "length", "act_embed"))
        x = nn.Dropout(cfg.dropout)(x, deterministic=deterministic)

        layers = stack(Block, cfg.num_layers, self.remat)(
            cfg, self.dtype, self.lora, deterministic, name="layers"
        )
        x = RMSNorm(cfg.norm_eps, False, name="final_norm")(layers(x, shared)[0])
        return nn.Dropout(cfg.dropout)(x, deterministic=deterministic)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> jax.Array:
    """Buckets [length queries, length keys] int32 of the distances between tokens.

    Half of the buckets are for keys after the query. In each half, near distances have a bucket of
    their own and far ones share buckets that widen logarithmically.
    """
    half = num_buckets // 2
    exact = half // 2
    # In float32 and in this order, as PyTorch computes them: some lie on a bucket's border.
    distance = np.arange(length, dtype=np.float32)
    far = np.log(np.maximum(distance, 1) / np.float32(exact))
    far = far / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    bucket = np.where(distance < exact, distance, np.minimum(exact + far.astype(int), half - 1))
    ahead = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
    return jnp.asarray(bucket, jnp.int32)[jnp.abs(ahead)] + half * (ahead > 0)
