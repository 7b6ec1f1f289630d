"""SPLADE: a text's vector says how much each token of the vocabulary counts, present or not.

A masked language model gives every token of a text a score for each token of the vocabulary; of
these the greatest, if it is above 0, counts by log(1 + score). Formal et al., arXiv 2107.05720 and,
with the maximum, 2109.10086.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from expandr_jax.models.bert import Bert, BertConfig
from expandr_jax.models.encoder import ACTIVATIONS, Encoder, HeadLayer, LayerNorm
from expandr_jax.models.stack import parameter
from expandr_jax.sharding import constrain


class SpladeEncoder(Encoder):
    """Token ids to vectors [batch, vocab_size] float32, none of whose numbers is below 0.

    It is called as `Bert` is. The head is that of BERT's masked language model: a layer with the
    encoder's activation, a norm, and a product with the embeddings.
    """

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, attention_mask: jax.Array, *, deterministic: bool = True
    ) -> jax.Array:
        cfg = self.config
        encoder = Bert(cfg, self.dtype, self.remat, self.lora, name="encoder")
        hidden = encoder(input_ids, attention_mask, deterministic=deterministic)
        x = ACTIVATIONS[cfg.activation](HeadLayer(cfg.hidden_size, name="head_dense")(hidden))
        x = LayerNorm(cfg.norm_eps, name="head_norm")(x)
        bias = parameter(self, "head_bias", ("vocab",), (cfg.vocab_size,), nn.initializers.zeros)
        table = nn.meta.unbox(encoder.get_variable("params", "embedding"))
        scores = jnp.einsum(
            "bld,vd->blv",
            x.astype(self.dtype),
            table.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        scores = constrain(scores, ("batch", "length", "vocab")) + bias.astype(jnp.float32)
        # Both functions grow with the score, so the maximum may come first.
        best = jnp.max(jnp.where(attention_mask[..., None] > 0, scores, 0.0), axis=1)
        return jnp.log1p(nn.relu(best))
