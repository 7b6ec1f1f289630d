"""Decoders: Llama 3, Mistral, Qwen 2 and 3, and Gemma 3's text model."""

from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.models.decoder import Decoder, DecoderConfig
from expandr_jax.weights.families import decoder_gguf
from expandr_jax.weights.families.family import (
    ACTIVATION_NAMES,
    MOST_LAYERS,
    Family,
    layer_types,
    rope_scaling,
    rope_theta,
)
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.names import Weight, linear

# The activations of a gated feed-forward.
_GATES = tuple(name for name in ACTIVATION_NAMES if name not in ("gelu", "relu"))
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000.0,
        "rope_theta": 1000000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
        "vocab_size": 262208,
    },
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"head_dim": 128, "max_position_embeddings": 32768, "num_key_value_heads": 32},
}


def _read(hf: Fields, kind: str) -> DecoderConfig:
    gemma = kind == "gemma3_text"
    hf.only(mlp_bias=False, final_logit_softcapping=None, attn_logit_softcapping=None)
    hf.only(attention_bias=False, partial_rotary_factor=1.0)
    for name in {"is_causal", "use_bidirectional_attention"} - unmasked(kind).keys():
        hf.only(**{name: name == "is_causal"})
    causal = all(hf.flag(name, not said) != said for name, said in unmasked(kind).items())
    heads = hf.count("num_attention_heads")
    if "num_key_value_heads" in hf:
        hf.quotient("num_attention_heads", "num_key_value_heads")
    if "head_dim" not in hf:
        hf.quotient("hidden_size", "num_attention_heads")
    width = hf.count("head_dim", hf.count("hidden_size") // heads)
    if width % 2:
        raise UserError(
            f"{hf.where}: head_dim is {width}; expected an even number: its halves rotate together"
        )
    window, is_local = _sliding(hf, kind, causal)
    activation = "hidden_activation" if gemma else "hidden_act"
    return DecoderConfig(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("hidden_size"),
        num_layers=hf.count("num_hidden_layers", most=MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=hf.count("num_key_value_heads", heads),
        head_dim=width,
        mlp_dim=hf.count("intermediate_size"),
        max_positions=hf.count("max_position_embeddings"),
        activation=ACTIVATION_NAMES[hf.choice(activation, _GATES, "silu")],
        norm_eps=hf.number("rms_norm_eps", 1e-6, above=0),
        tie_embeddings=hf.flag("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("gemma3_text", "qwen3"),
        norm_plus_one=gemma,
        post_norms=gemma,
        scale_embeddings=gemma,
        query_scale=hf.number("query_pre_attn_scalar", above=0) ** -0.5 if gemma else None,
        sliding_window=window,
        layer_is_local=is_local,
        causal=causal,
        **_rope(hf, gemma),
    )


def unmasked(kind: str) -> dict[str, bool]:
    """What config.json says of a decoder that transformers is to read without its causal mask."""
    if kind == "gemma3_text":
        return {"use_bidirectional_attention": True}
    return {"is_causal": False}


def _sliding(hf: Fields, kind: str, causal: bool) -> tuple[int | None, tuple[bool, ...]]:
    """Width of the local attention and which layers use it."""
    layers = hf.count("num_hidden_layers", most=MOST_LAYERS)
    types = layer_types(hf, layers)
    window = hf.count("sliding_window", None)
    if kind.startswith("qwen") and not hf.flag("use_sliding_window", False):
        window = None
    if window is None or kind == "llama":
        return None, ()
    if not causal:
        # To both sides: Gemma's is all that is seen, another's what is seen to each.
        window = window // 2 + 1 if kind == "gemma3_text" else window + 1
    if types is not None:
        return window, tuple(kind == "sliding_attention" for kind in types)
    if kind == "mistral":
        return window, (True,) * layers
    if kind == "gemma3_text":
        every = hf.count("sliding_window_pattern", hf.count("_sliding_window_pattern", 6))
        return window, tuple((layer + 1) % every != 0 for layer in range(layers))
    first = hf.count("max_window_layers", 28, least=0)
    return window, tuple(layer >= first for layer in range(layers))


def _rope(hf: Fields, gemma: bool) -> dict[str, Any]:
    """Rotary fields of a decoder, from the present form (rope_parameters) or the older."""
    given = hf.section("rope_parameters" if "rope_parameters" in hf else "rope_scaling")
    full, local = given, Fields({}, hf.where)
    if "full_attention" in given:
        full, local = given.section("full_attention"), given.section("sliding_attention")
    full.only(partial_rotary_factor=1.0)
    theta = rope_theta(full, hf, "rope_theta", 10000.0)
    rope = {"rope_theta": theta, "rope_scaling": rope_scaling(full)}
    if gemma:
        local.only(rope_type="default")
        rope["rope_local_theta"] = rope_theta(local, hf, "rope_local_base_freq")
    return rope


def decoder_weights(config: DecoderConfig, with_head: bool) -> list[Weight]:
    """The tensors of a decoder; `with_head` adds the output head where it is not the embedding."""
    layer, attention, mlp = "layers.{}.", "layers.{}.self_attn.", "layers.{}.mlp."
    norms = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.post_norms:
        norms["post_attention_norm"] = "post_attention_layernorm"
        norms["mlp_norm"] = "pre_feedforward_layernorm"
        norms["post_mlp_norm"] = "post_feedforward_layernorm"
    # A file may hold a tied head as well, but then it is the embedding again.
    copies = ("lm_head.weight",) if with_head and config.tie_embeddings else ()
    weights = [
        Weight("embedding", "embed_tokens.weight", copies=copies),
        Weight("final_norm/scale", "norm.weight"),
    ]
    weights += [Weight(f"layers/{ours}/scale", f"{layer}{hf}.weight") for ours, hf in norms.items()]
    for name in ("q_proj", "k_proj", "v_proj"):
        weights += linear(f"layers/self_attn/{name}", attention + name, config.qkv_bias)
    weights += linear("layers/self_attn/o_proj", attention + "o_proj", False)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            weights.append(Weight(f"layers/self_attn/{name}/scale", f"{attention}{name}.weight"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights += linear(f"layers/mlp/{name}", mlp + name, False)
    if with_head and not config.tie_embeddings:
        weights.append(Weight("lm_head", "lm_head.weight", transpose=True, bare=True))
    return weights


FAMILY = Family(
    classes={
        "gemma3_text": ("Gemma3TextModel", "Gemma3ForCausalLM"),
        "llama": ("LlamaModel", "LlamaForCausalLM"),
        "mistral": ("MistralModel", "MistralForCausalLM"),
        "qwen2": ("Qwen2Model", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Model", "Qwen3ForCausalLM"),
    },
    defaults=_DEFAULTS,
    read_config=_read,
    config=DecoderConfig,
    module=Decoder,
    weights=decoder_weights,
    pooling="last",
    generates=True,
    ignored=(r"(.*\.)?rotary_emb\.inv_freq", r"lm_head\..*"),
    tokenizer_classes={
        "gemma3_text": "GemmaTokenizer",
        "qwen2": "Qwen2Tokenizer",
        "qwen3": "Qwen2Tokenizer",
    },
    misnamed=("mistral", "qwen2"),
    unmasked=unmasked,
    gguf=decoder_gguf.GGUF_FORMS,
)
