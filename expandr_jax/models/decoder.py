"""One decoder-only transformer for Llama, Mistral, Qwen and Gemma, chosen by explicit options.

Decoding unrolls the layers of `stack`: a step does so little work that slicing each layer's weights
and cache out of a stack would cost as much again.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from expandr_jax.models.attention import attend, attend_with_cache
from expandr_jax.models.lora import LoraConfig, Projection
from expandr_jax.models.mask import Mask, causal_mask, padding_mask
from expandr_jax.models.quantized import is_quantized
from expandr_jax.models.rope import RopeScaling, apply_rope, rope_angles
from expandr_jax.models.stack import TransformerConfig, parameter, stack
from expandr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DecoderConfig(TransformerConfig):
    """Options of a decoder; field meanings follow Hugging Face's configurations.

    Its feed-forward is gated.

    Attributes:
        num_kv_heads: Key and value heads; divides num_heads (grouped-query attention).
        head_dim: Width of one head.
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
        quantized: How projections keep their weights, as `lora.Projection` says.
        causal: No token sees a later one. A decoder that was trained for retrieval may be read
            without that mask (LLM2Vec, arXiv 2404.05961; EmbeddingGemma, arXiv 2509.20354).
    """

    num_kv_heads: int
    head_dim: int
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
    quantized: str = ""
    causal: bool = True


@flax.struct.dataclass
class KVCache:
    """Keys and values of past tokens, an array for each layer.

    Attributes:
        keys: Each [batch, kv_heads, head_dim, slots]; slot s of a row holds its token number s.
        values: Each [batch, kv_heads, slots, head_dim].
        length: [batch] int32, how many slots of a row are filled.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array

    @classmethod
    def zeros(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any) -> "KVCache":
        layers, heads, width = range(config.num_layers), config.num_kv_heads, config.head_dim
        return cls(
            tuple(jnp.zeros((batch, heads, width, slots), dtype) for _ in layers),
            tuple(jnp.zeros((batch, heads, slots, width), dtype) for _ in layers),
            jnp.zeros((batch,), jnp.int32),
        )


class RMSNorm(nn.Module):
    """x / rms(x) * w, in float32; w counts from one where `plus_one`."""

    eps: float
    plus_one: bool
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = parameter(self, "scale", (self.axis,), (x.shape[-1],), init)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32) + float(self.plus_one)
        return (y * scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


class DecoderPart(nn.Module):
    """A part of the decoder that has projections."""

    config: DecoderConfig
    dtype: Any
    lora: LoraConfig | None
    deterministic: bool

    def project(self, name, features, axes, x, use_bias=False):
        options = use_bias, self.dtype, self.lora, self.config.quantized
        return Projection(features, axes, *options, name=name)(x, self.deterministic)


class Attention(DecoderPart):
    """Grouped-query attention with rotary positions."""

    @nn.compact
    def __call__(self, x, rope, mask, cached, past):
        cfg = self.config

        def project(name, heads, axis):
            width = heads * cfg.head_dim
            y = self.project(name, width, ("embed", axis), x, cfg.qkv_bias)
            return y.reshape(*x.shape[:2], heads, cfg.head_dim)

        q = project("q_proj", cfg.num_heads, "heads")
        k = project("k_proj", cfg.num_kv_heads, "kv_heads")
        v = project("v_proj", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q = RMSNorm(cfg.norm_eps, cfg.norm_plus_one, "head_dim", name="q_norm")(q)
            k = RMSNorm(cfg.norm_eps, cfg.norm_plus_one, "head_dim", name="k_norm")(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        scale = cfg.head_dim**-0.5 if cfg.query_scale is None else cfg.query_scale
        if cached is None:
            kv = (k.swapaxes(1, 2), v.swapaxes(1, 2))
            if past is not None:
                k, v = (_after(before, new) for before, new in zip(past, (k, v), strict=True))
            out = attend(q, k, v, mask, scale=scale)
        else:
            out, *kv = attend_with_cache(q, k, v, *cached, mask=mask.dense(1), scale=scale)
        out = out.reshape(*x.shape[:2], -1)
        return self.project("o_proj", cfg.hidden_size, ("heads", "embed"), out), kv


def _after(past: jax.Array, new: jax.Array) -> jax.Array:
    """What all rows share, [1, kv_heads, past, head_dim], before [batch, length, kv_heads, ...]."""
    past = past.swapaxes(1, 2).astype(new.dtype)
    return jnp.concatenate([jnp.broadcast_to(past, (len(new), *past.shape[1:])), new], axis=1)


class GatedMLP(DecoderPart):
    """act(x W_gate) * (x W_up), then W_down."""

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        gate = self.project("gate_proj", cfg.mlp_dim, ("embed", "mlp"), x)
        up = self.project("up_proj", cfg.mlp_dim, ("embed", "mlp"), x)
        gate = nn.silu(gate) if cfg.activation == "silu" else nn.gelu(gate, approximate=True)
        return self.project("down_proj", cfg.hidden_size, ("mlp", "embed"), gate * up)


class Block(DecoderPart):
    """One transformer block in the form of `nn.scan`: (carry, layer, shared) -> (carry, out)."""

    keep_kv: bool

    @nn.compact
    def __call__(self, x, layer, shared):
        cfg = self.config
        cached, past, is_local = layer
        rope, mask = shared["rope"], shared["mask"].replace(windowed=is_local)
        if isinstance(is_local, bool):
            rope = shared["local_rope"] if is_local else rope
        elif is_local is not None:
            local_rope = shared["local_rope"]
            rope = jax.tree.map(lambda a, b: jnp.where(is_local, a, b), local_rope, rope)

        def norm(name, y):
            return RMSNorm(cfg.norm_eps, cfg.norm_plus_one, name=name)(y)

        options = cfg, self.dtype, self.lora, self.deterministic
        attention = Attention(*options, name="self_attn")
        y, kv = attention(norm("input_norm", x), rope, mask, cached, past)
        x = x + (norm("post_attention_norm", y) if cfg.post_norms else y)
        y = GatedMLP(*options, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("post_mlp_norm", y) if cfg.post_norms else y)
        x = constrain(x, ("batch", "length", "act_embed"))
        return x, kv if self.keep_kv else None


class Decoder(nn.Module):
    """Token ids to hidden states, and hidden states to logits.

    Attributes:
        config: The model's shape.
        dtype: Compute type; norms, softmax and logits are float32 whatever it is.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
        lora: Settings for the "lora" collection, if one is passed.
        unroll: Layers one by one, with parameters from `unstack_layers`.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    lora: LoraConfig | None = None
    unroll: bool = False

    def inputs(self, input_ids: jax.Array, attention_mask: jax.Array) -> tuple[Any, ...]:
        """As `Encoder.inputs`."""
        mask = causal_mask if self.config.causal else padding_mask
        return input_ids, token_positions(attention_mask), mask(attention_mask)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: Mask,
        *,
        past: tuple[Sequence[jax.Array], Sequence[jax.Array]] | None = None,
        keep_kv: bool = False,
        deterministic: bool = True,
    ):
        """Runs the blocks and the last norm.

        Args:
            tokens: [batch, length] int32.
            positions: [batch, length] int32, the rotary positions.
            mask: Over [batch, past + length] keys, which tokens each may attend to.
            past: Keys and values of tokens that every row begins with, at positions 0 and on; per
                layer [1, kv_heads, past, head_dim]. For unrolled layers.
            keep_kv: Return these tokens' keys and values too.
            deterministic: False applies the adapter's dropout (rng "dropout").

        Returns:
            Hidden states [batch, length, hidden_size] in the compute type; with `keep_kv` also
            (keys, values), each [layers, batch, kv_heads, length, head_dim], or a tuple of them
            layer by layer where these are unrolled.
        """
        x, kv = self._forward(tokens, positions, mask, None, past, keep_kv, deterministic)
        return (x, kv) if keep_kv else x

    @nn.compact
    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Adds one token to each row of a cache; for unrolled layers.

        Args:
            tokens: [batch] int32.
            cache: What came before; the tokens' keys and values are written at `cache.length`.

        Returns:
            Hidden states [batch, hidden_size] in the compute type, and the cache, longer by one.
        """
        positions = cache.length[:, None]
        slots = jnp.arange(cache.keys[0].shape[3], dtype=jnp.int32)
        mask = Mask(array=(slots <= positions)[:, None])
        x, (keys, values) = self._forward(tokens[:, None], positions, mask, cache, None, True, True)
        return x[:, 0], KVCache(keys, values, cache.length + 1)

    @nn.compact
    def logits(self, hidden: jax.Array) -> jax.Array:
        """Maps hidden states [..., hidden_size] to float32 logits [..., vocab_size]."""
        if self.config.tie_embeddings:
            table, contract = self._embedding(), 1
        else:
            table, contract = self._head(), 0
        dims = (((hidden.ndim - 1,), (contract,)), ((), ()))
        operands = hidden.astype(self.dtype), table.astype(self.dtype)
        logits = jax.lax.dot_general(*operands, dims, preferred_element_type=jnp.float32)
        # Said outright, or the compiler may gather the table rather than what it gives.
        return constrain(logits, ("batch", *["length"] * (hidden.ndim - 2), "vocab"))

    def _embedding(self) -> jax.Array:
        cfg = self.config
        return parameter(self, "embedding", ("vocab", "embed"), (cfg.vocab_size, cfg.hidden_size))

    def _head(self) -> jax.Array:
        cfg = self.config
        shape, init = (cfg.hidden_size, cfg.vocab_size), nn.initializers.lecun_normal()
        return parameter(self, "lm_head", ("embed", "vocab"), shape, init)

    def _forward(self, tokens, positions, mask, cache, past, keep_kv, deterministic):
        cfg = self.config
        x = self._embedding()[tokens].astype(self.dtype)
        x = constrain(x, ("batch", "length", "act_embed"))
        if cfg.scale_embeddings:
            x = x * jnp.asarray(cfg.hidden_size**0.5, self.dtype)
        if cache is None:
            mask = mask.prepared(tokens.shape[1])
        rope = positions, cfg.head_dim
        shared = {"rope": rope_angles(*rope, cfg.rope_theta, cfg.rope_scaling)}
        is_local = None
        if cfg.sliding_window is not None and any(cfg.layer_is_local):
            # Llama 3.1's stretching belongs to the global base; local layers (Gemma 3) have none.
            scaling = cfg.rope_scaling if cfg.rope_local_theta is None else None
            theta = cfg.rope_local_theta or cfg.rope_theta
            shared["local_rope"] = rope_angles(*rope, theta, scaling)
            keys = positions if cache is None else jnp.arange(mask.array.shape[2])[None]
            if past is not None:
                before = jnp.arange(past[0][0].shape[2], dtype=jnp.int32)
                before = jnp.broadcast_to(before, (len(tokens), len(before)))
                keys = jnp.concatenate([before, positions], axis=1)
            mask = mask.within(cfg.sliding_window, positions, keys)
            is_local = cfg.layer_is_local
        shared["mask"] = mask
        options = cfg, self.dtype, self.lora, deterministic, keep_kv
        if self.unroll:
            kv = []
            for i in range(cfg.num_layers):
                cached = None if cache is None else (cache.keys[i], cache.values[i], cache.length)
                before = None if past is None else (past[0][i], past[1][i])
                local = None if is_local is None else is_local[i]
                x, new = Block(*options, name=f"layer_{i}")(x, (cached, before, local), shared)
                kv.append(new)
            kv = tuple(zip(*kv, strict=True)) if keep_kv else None
        else:
            assert cache is None, "a cache needs unrolled layers"
            assert past is None, "what came before needs unrolled layers"
            layers = stack(Block, cfg.num_layers, self.remat, (0, nn.broadcast))
            flags = None if is_local is None else jnp.asarray(is_local)
            x, kv = layers(*options, name="layers")(x, (None, None, flags), shared)
        x = RMSNorm(cfg.norm_eps, cfg.norm_plus_one, name="final_norm")(x)
        if self.is_initializing() and not cfg.tie_embeddings:
            self._head()
        return x, kv


def unstack_layers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters or an adapter for `Decoder(unroll=True)`: "layers" split into "layer_0" and on."""
    tree = dict(tree)
    stacked = tree.pop("layers")
    count = jax.tree.leaves(stacked)[0].shape[0]
    return tree | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(count)}


def cast_weights(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Weights in the compute type, but for what has another type whatever that is."""

    def cast(path, leaf):
        # Norms compute in float32 and keep their scales so; products use the compute type only.
        kept = path[-1].key in ("scale", "kernel_scale") or is_quantized(leaf)
        # The same type would copy an array of numpy's.
        return leaf if kept or leaf.dtype == dtype else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def token_positions(attention_mask: jax.Array) -> jax.Array:
    """Positions that count real tokens only, so that padding on either side changes nothing."""
    return jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0).astype(jnp.int32)
