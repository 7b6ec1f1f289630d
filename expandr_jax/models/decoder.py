"""One decoder-only transformer for Llama, Mistral, Qwen and Gemma, chosen by explicit options.

Layers run under `nn.scan`, so every parameter of a layer is stacked along a leading "layers" axis
and a program's size does not grow with depth. Attention reads a key-value cache but never writes
it: a call returns the new keys and values, and the caller puts them where they belong, which lets
one cache serve prefill, decoding with slots, and prompts shared by several continuations.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend, attend_with_cache
from expandr_jax.models.lora import LoraConfig, Projection
from expandr_jax.models.rope import RopeScaling, apply_rope, rope_angles

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and options of a decoder; field meanings follow Hugging Face's configurations.

    Attributes:
        vocab_size: Rows of the embedding table.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides num_heads (grouped-query attention).
        head_dim: Width of one head.
        mlp_dim: Inner width of the gated feed-forward.
        max_positions: Longest sequence the model was made for, in tokens.
        activation: "silu" or "gelu_tanh", on the gate.
        norm_eps: Epsilon of the root-mean-square norms.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Llama 3.1's or linear stretching of the frequencies, if any.
        tie_embeddings: The output head is the embedding table.
        qkv_bias: Biases on q, k and v (Qwen2).
        qk_norm: Norms on q and k per head (Qwen3, Gemma 3).
        norm_plus_one: Norms scale by 1 + w (Gemma).
        post_norms: Norms after attention and feed-forward too (Gemma).
        scale_embeddings: Embeddings are multiplied by sqrt(hidden_size) (Gemma).
        query_scale: Scores are multiplied by this; None means head_dim ** -0.5.
        sliding_window: Width of local attention in tokens; None means all layers are global.
        layer_is_local: Per layer, whether it attends locally; empty means none does.
        rope_local_theta: Rotary base of local layers (Gemma 3); None means rope_theta.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    max_positions: int
    activation: str = "silu"
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    scale_embeddings: bool = False
    query_scale: float | None = None
    sliding_window: int | None = None
    layer_is_local: tuple[bool, ...] = ()
    rope_local_theta: float | None = None


@flax.struct.dataclass
class KVCache:
    """Keys and values of past tokens: [layers, batch, kv_heads, slots, head_dim] each.

    Slot s of a row holds the token at position s; `length` [batch] says how many slots are filled.
    """

    keys: jax.Array
    values: jax.Array
    length: jax.Array

    @classmethod
    def zeros(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

    def append(self, keys: jax.Array, values: jax.Array) -> "KVCache":
        """Writes one token per row, [layers, batch, kv_heads, 1, head_dim], at each row's length."""
        rows = jnp.arange(keys.shape[1])
        place = (slice(None), rows, slice(None), self.length)
        # Advanced indices are apart, so their axis comes first: [batch, layers, kv_heads, head_dim].
        return KVCache(
            self.keys.at[place].set(jnp.moveaxis(keys[:, :, :, 0], 1, 0).astype(self.keys.dtype)),
            self.values.at[place].set(jnp.moveaxis(values[:, :, :, 0], 1, 0).astype(self.values.dtype)),
            self.length + 1,
        )


class RMSNorm(nn.Module):
    """x / rms(x) * w, in float32; w counts from one where `plus_one`."""

    eps: float
    plus_one: bool
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", nn.with_logical_partitioning(init, (self.axis,)), (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32) + float(self.plus_one)
        return (y * scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: DecoderConfig
    dtype: Any
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x, rope, mask, cached, cache_mask, deterministic):
        cfg = self.config
        batch, length, _ = x.shape

        def project(name, heads, axis):
            width = heads * cfg.head_dim
            layer = Projection(width, ("embed", axis), cfg.qkv_bias, self.dtype, self.lora, name=name)
            return layer(x, deterministic).reshape(batch, length, heads, cfg.head_dim)

        q = project("q_proj", cfg.num_heads, "heads")
        k = project("k_proj", cfg.num_kv_heads, "kv_heads")
        v = project("v_proj", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.norm_plus_one, "head_dim", name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.norm_plus_one, "head_dim", name="k_norm")(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        scale = cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale
        if cached is None:
            out = attend(q, k, v, mask=mask, scale=scale)
        else:
            out = attend_with_cache(q, k, v, mask, *cached, cache_mask, scale=scale)
        out = out.reshape(batch, length, cfg.num_heads * cfg.head_dim)
        out = Projection(
            cfg.hidden_size, ("heads", "embed"), False, self.dtype, self.lora, name="o_proj"
        )(out, deterministic)
        return out, (k.swapaxes(1, 2), v.swapaxes(1, 2))


class GatedMLP(nn.Module):
    """act(x W_gate) * (x W_up), then W_down."""

    config: DecoderConfig
    dtype: Any
    lora: LoraConfig | None

    @nn.compact
    def __call__(self, x, deterministic):
        cfg = self.config

        def project(name, features, axes, y):
            return Projection(features, axes, False, self.dtype, self.lora, name=name)(y, deterministic)

        gate = project("gate_proj", cfg.mlp_dim, ("embed", "mlp"), x)
        up = project("up_proj", cfg.mlp_dim, ("embed", "mlp"), x)
        gate = nn.silu(gate) if cfg.activation == "silu" else nn.gelu(gate, approximate=True)
        return project("down_proj", cfg.hidden_size, ("mlp", "embed"), gate * up)


class Block(nn.Module):
    """One transformer block, in the form `nn.scan` wants: (carry, per-layer, shared) -> (carry, out)."""

    config: DecoderConfig
    dtype: Any
    lora: LoraConfig | None
    deterministic: bool
    keep_kv: bool

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg = self.config
        cached, is_local = layer
        rope, mask, cache_mask = shared["global"]
        if is_local is not None:
            rope, mask, cache_mask = jax.tree.map(
                lambda a, b: jnp.where(is_local, a, b), shared["local"], shared["global"]
            )

        def norm(name, y):
            return RMSNorm(cfg.norm_eps, cfg.norm_plus_one, name=name)(y)

        attention = Attention(cfg, self.dtype, self.lora, name="self_attn")
        y, kv = attention(norm("input_norm", x), rope, mask, cached, cache_mask, self.deterministic)
        x = x + (norm("post_attention_norm", y) if cfg.post_norms else y)
        mlp = GatedMLP(cfg, self.dtype, self.lora, name="mlp")
        y = mlp(norm("mlp_norm", x), self.deterministic)
        x = x + (norm("post_mlp_norm", y) if cfg.post_norms else y)
        x = nn.with_logical_constraint(x, ("batch", "length", "act_embed"))
        return x, kv if self.keep_kv else None


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    Attributes:
        config: The model's shape.
        dtype: Compute type; norms, softmax and logits are float32 whatever it is.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
        lora: Settings for the "lora" collection, if one is passed.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: LoraConfig | None = None

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: KVCache | None = None,
        *,
        keep_kv: bool = False,
        deterministic: bool = True,
    ):
        """Runs the blocks and the last norm.

        Args:
            tokens: [batch, length] int32.
            positions: [batch, length] int32, the rotary positions.
            mask: [batch, length, length] bool, which of these tokens each may attend to.
            cache: Past keys and values; all filled slots are visible to every token.
            keep_kv: Return these tokens' keys and values too.
            deterministic: False applies the adapter's dropout (rng "dropout").

        Returns:
            Hidden states [batch, length, hidden_size] in the compute type; with `keep_kv` also
            (keys, values), each [layers, batch, kv_heads, length, head_dim].
        """
        cfg = self.config
        x = self._embedding()[tokens].astype(self.dtype)
        if cfg.scale_embeddings:
            x = x * jnp.asarray(cfg.hidden_size**0.5, self.dtype)
        cached = None if cache is None else (cache.keys, cache.values)
        shared = {"global": self._positions(positions, mask, cache, cfg.rope_theta, None)}
        is_local = None
        if cfg.sliding_window is not None and any(cfg.layer_is_local):
            theta = cfg.rope_local_theta or cfg.rope_theta
            shared["local"] = self._positions(positions, mask, cache, theta, cfg.sliding_window)
            is_local = jnp.asarray(cfg.layer_is_local)

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            out_axes=0,
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(cfg, self.dtype, self.lora, deterministic, keep_kv, name="layers")
        x, kv = layers(x, (cached, is_local), shared)
        x = RMSNorm(cfg.norm_eps, cfg.norm_plus_one, name="final_norm")(x)
        if self.is_initializing() and not cfg.tie_embeddings:
            self._head()
        return (x, kv) if keep_kv else x

    @nn.compact
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., hidden_size] to float32 logits [..., vocab_size]."""
        if self.config.tie_embeddings:
            table, contract = self._embedding(), 1
        else:
            table, contract = self._head(), 0
        dims = (((hidden.ndim - 1,), (contract,)), ((), ()))
        operands = hidden.astype(self.dtype), table.astype(self.dtype)
        return jax.lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)

    def _embedding(self) -> jax.Array:
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        return self.param("embedding", init, (cfg.vocab_size, cfg.hidden_size))

    def _head(self) -> jax.Array:
        cfg = self.config
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "vocab"))
        return self.param("lm_head", init, (cfg.hidden_size, cfg.vocab_size))

    def _positions(self, positions, mask, cache, theta, window):
        """Rotary angles and masks of one kind of layer: (rope, mask, cache mask or None)."""
        cfg = self.config
        # Llama 3.1's stretching belongs to the global base; local layers (Gemma 3) have none.
        scaling = cfg.rope_scaling if window is None or cfg.rope_local_theta is None else None
        rope = rope_angles(positions, cfg.head_dim, theta, scaling)
        cache_mask = None
        if window is not None:
            mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
        if cache is not None:
            slots = jnp.arange(cache.keys.shape[3], dtype=jnp.int32)
            cache_mask = (slots[None, :] < cache.length[:, None])[:, None, :]
            if window is not None:
                cache_mask = cache_mask & (positions[:, :, None] - slots[None, None, :] < window)
            cache_mask = jnp.broadcast_to(cache_mask, (*positions.shape, slots.size))
        return rope, mask, cache_mask


def causal_mask(attention_mask: jax.Array) -> jax.Array:
    """[batch, length] of 0/1 to the [batch, length, length] mask of a plain causal pass."""
    length = attention_mask.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal[None] & (attention_mask[:, None, :] > 0)


def token_positions(attention_mask: jax.Array) -> jax.Array:
    """Positions that count real tokens only, so that padding on either side changes nothing."""
    return jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0).astype(jnp.int32)
