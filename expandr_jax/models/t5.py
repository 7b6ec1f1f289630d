"""The encoder of T5 (arXiv 1910.10683), as GTR and sentence-T5 use it.

Pre-norm blocks under `nn.scan`; positions enter only as a bias on the scores, by bucket of
distance, from a table that all layers share.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.models.attention import attend
from expandr_jax.models.decoder import RMSNorm
from expandr_jax.models.lora import Projection
from expandr_jax.models.mask import padding_mask
from expandr_jax.models.stack import stack
from expandr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape and options of a T5 encoder.

    Attributes:
        vocab_size: Rows of the token table.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        head_dim: Width of one head; num_heads * head_dim need not be hidden_size.
        mlp_dim: Inner width of the feed-forward.
        gated: The feed-forward is gelu(x W_0) * (x W_1) (T5 1.1) and not relu(x W).
        num_buckets: Buckets of relative distance, half of them for each direction.
        max_distance: Farther tokens share the last bucket.
        norm_eps: Epsilon of the root-mean-square norms.
        dropout: Rate of dropout everywhere.
        max_positions: None: relative positions set no limit.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1
    max_positions: None = None


class Block(nn.Module):
    """One encoder block, in the form `nn.scan` wants: (carry, shared) -> (carry, None)."""

    config: T5Config
    dtype: Any
    deterministic: bool

    @nn.compact
    def __call__(self, x, shared):
        cfg = self.config
        x = x + self._drop(
            self._attention(RMSNorm(cfg.norm_eps, False, name="input_norm")(x), shared)
        )
        x = x + self._drop(self._mlp(RMSNorm(cfg.norm_eps, False, name="mlp_norm")(x)))
        return constrain(x, ("batch", "length", "act_embed")), None

    def _attention(self, x, shared):
        cfg = self.config
        mask, bias = shared
        q, k, v = (
            self._project(name, cfg.num_heads * cfg.head_dim, ("embed", "heads"), x).reshape(
                *x.shape[:2], cfg.num_heads, cfg.head_dim
            )
            for name in ("q_proj", "k_proj", "v_proj")
        )
        dropout = None
        if not self.deterministic and cfg.dropout > 0:
            dropout = nn.Dropout(cfg.dropout, deterministic=False)
        # T5 does not scale its scores: its initialisation does.
        out = attend(q, k, v, mask, scale=1.0, bias=bias, dropout=dropout)
        out = out.reshape(*x.shape[:2], cfg.num_heads * cfg.head_dim)
        return self._project("o_proj", cfg.hidden_size, ("heads", "embed"), out)

    def _mlp(self, x):
        cfg = self.config
        up = self._project("up_proj", cfg.mlp_dim, ("embed", "mlp"), x)
        if cfg.gated:
            gate = self._project("gate_proj", cfg.mlp_dim, ("embed", "mlp"), x)
            y = nn.gelu(gate, approximate=True) * up
        else:
            y = nn.relu(up)
        return self._project("down_proj", cfg.hidden_size, ("mlp", "embed"), self._drop(y))

    def _project(self, name, features, axes, x):
        layer = Projection(features, axes, False, self.dtype, name=name)
        return layer(x)

    def _drop(self, x):
        return nn.Dropout(self.config.dropout)(x, deterministic=self.deterministic)


class T5Encoder(nn.Module):
    """Token ids to hidden states.

    Attributes:
        config: The model's shape.
        dtype: Compute type; norms and softmax are float32 whatever it is.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
    """

    config: T5Config
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

        def table(name, rows, columns, axes):
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
            return self.param(name, init, (rows, columns))

        tokens = table("embedding", cfg.vocab_size, cfg.hidden_size, ("vocab", "embed"))
        distances = table("relative_bias", cfg.num_buckets, cfg.num_heads, ("buckets", "heads"))
        buckets = relative_buckets(input_ids.shape[1], cfg.num_buckets, cfg.max_distance)
        mask = padding_mask(attention_mask).prepared(input_ids.shape[1])
        shared = mask, distances[buckets].transpose(2, 0, 1)
        x = constrain(tokens[input_ids].astype(self.dtype), ("batch", "length", "act_embed"))
        x = nn.Dropout(cfg.dropout)(x, deterministic=deterministic)

        layers = stack(Block, cfg.num_layers, self.remat)(
            cfg, self.dtype, deterministic, name="layers"
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
