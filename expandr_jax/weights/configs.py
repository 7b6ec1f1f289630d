"""Hugging Face's config.json to our model configurations, and what of it is supported."""

from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.models.anchordr import FARTHEST, AnchorDrConfig
from expandr_jax.models.bert import BertConfig
from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.models.rope import RopeScaling
from expandr_jax.models.t5 import T5Config
from expandr_jax.weights.fields import Fields, shown
from expandr_jax.weights.names import ModelConfig

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Those of a gated feed-forward.
_GATES = tuple(name for name in _ACTIVATIONS if name not in ("gelu", "relu"))
_FEED_FORWARDS = ("relu", "gated-gelu")
_LAYER_TYPES = ("full_attention", "sliding_attention")
_ROPE_TYPES = ("default", "linear", "llama3")
_MOST_LAYERS = 10_000  # A layer's tensors are listed one by one.

_BERTS = ("bert", "camembert", "roberta", "xlm-roberta")
ENCODERS = (*_BERTS, "t5", "anchordr")
DECODERS = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")

# Values that transformers assumes where a file leaves them out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"layer_norm_eps": 1e-12, "type_vocab_size": 2},
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
    "roberta": {"layer_norm_eps": 1e-12, "type_vocab_size": 2},
    "t5": {
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
    },
}


def model_config(hf: Fields, kind: str | None) -> ModelConfig:
    """Reads a Hugging Face configuration.

    Args:
        hf: config.json.
        kind: Its model_type, or "anchordr".

    Returns:
        The configuration of the module that computes the same function.

    Raises:
        UserError: If the type or an option of the model is not supported, or a field is missing or
            cannot be.
    """
    if kind not in ENCODERS + DECODERS:
        known = ", ".join(ENCODERS + DECODERS)
        raise UserError(
            f"{hf.where}: model_type {shown(kind)} is not supported; supported: {known}"
        )
    if hf.values.get("quantization_config"):
        raise UserError(
            f"{hf.where}: quantization_config says that the weights are quantized; take the model "
            "before that, or a GGUF file"
        )
    defaults = _DEFAULTS.get({"anchordr": "t5"}.get(kind, kind), _DEFAULTS["roberta"])
    # A null means the default, but for the window, where it means none.
    given = {name: hf.values[name] for name in hf.values if name in hf or name == "sliding_window"}
    hf = Fields({**defaults, **given}, hf.where)
    if kind in _BERTS:
        return _bert(hf, kind)
    if kind == "t5":
        return _t5(hf)
    return _anchordr(hf) if kind == "anchordr" else _decoder(hf, kind)


def _bert(hf: Fields, kind: str) -> BertConfig:
    hf.only(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    hf.quotient("hidden_size", "num_attention_heads")
    offset = 0 if kind == "bert" else hf.count("pad_token_id", least=0) + 1
    return BertConfig(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("hidden_size"),
        num_layers=hf.count("num_hidden_layers", most=_MOST_LAYERS),
        num_heads=hf.count("num_attention_heads"),
        mlp_dim=hf.count("intermediate_size"),
        max_positions=hf.count("max_position_embeddings", least=offset + 1) - offset,
        position_offset=offset,
        num_token_types=hf.count("type_vocab_size"),
        activation=_ACTIVATIONS[hf.choice("hidden_act", tuple(_ACTIVATIONS), "gelu")],
        norm_eps=hf.number("layer_norm_eps", above=0),
        hidden_dropout=hf.rate("hidden_dropout_prob", 0.1),
        attention_dropout=hf.rate("attention_probs_dropout_prob", 0.1),
    )


def _t5(hf: Fields) -> T5Config:
    buckets = hf.count("relative_attention_num_buckets", least=4)
    return T5Config(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("d_model"),
        num_layers=hf.count("num_layers", most=_MOST_LAYERS),
        num_heads=hf.count("num_heads"),
        head_dim=hf.count("d_kv"),
        mlp_dim=hf.count("d_ff"),
        gated=hf.choice("feed_forward_proj", _FEED_FORWARDS) == "gated-gelu",
        num_buckets=buckets,
        # The near quarter of the buckets has a distance each; the farthest lies beyond.
        max_distance=hf.count("relative_attention_max_distance", least=buckets // 4 + 1),
        norm_eps=hf.number("layer_norm_epsilon", above=0),
        dropout=hf.rate("dropout_rate"),
    )


def _anchordr(hf: Fields) -> AnchorDrConfig:
    hf.only(d_kv=hf.quotient("d_model", "num_heads"), pad_token_id=1)
    layers = hf.count("num_layers", most=_MOST_LAYERS)
    return AnchorDrConfig(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("d_model"),
        num_layers=layers,
        num_decoder_layers=hf.count("num_decoder_layers", layers, most=_MOST_LAYERS),
        num_heads=hf.count("num_heads"),
        mlp_dim=hf.count("d_ff"),
        gated=hf.choice("feed_forward_proj", _FEED_FORWARDS) == "gated-gelu",
        num_buckets=hf.count("relative_attention_num_buckets", least=4, most=4 * FARTHEST - 1),
        norm_eps=hf.number("layer_norm_epsilon", above=0),
        dropout=hf.rate("dropout_rate"),
    )


def _decoder(hf: Fields, kind: str) -> DecoderConfig:
    gemma = kind == "gemma3_text"
    hf.only(mlp_bias=False, final_logit_softcapping=None, attn_logit_softcapping=None)
    hf.only(attention_bias=False, use_bidirectional_attention=False)
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
    window, is_local = _sliding(hf, kind)
    activation = "hidden_activation" if gemma else "hidden_act"
    return DecoderConfig(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("hidden_size"),
        num_layers=hf.count("num_hidden_layers", most=_MOST_LAYERS),
        num_heads=heads,
        num_kv_heads=hf.count("num_key_value_heads", heads),
        head_dim=width,
        mlp_dim=hf.count("intermediate_size"),
        max_positions=hf.count("max_position_embeddings"),
        activation=_ACTIVATIONS[hf.choice(activation, _GATES, "silu")],
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
        **_rope(hf, gemma),
    )


def _sliding(hf: Fields, kind: str) -> tuple[int | None, tuple[bool, ...]]:
    """Width of the local attention and which layers use it."""
    layers = hf.count("num_hidden_layers", most=_MOST_LAYERS)
    types = hf.items("layer_types", str, None)
    if types is not None and len(types) != layers:
        raise UserError(f"{hf.where}: layer_types has {len(types)} entries for {layers} layers")
    unknown = sorted({*(types or ())} - {*_LAYER_TYPES})
    if unknown:
        raise UserError(
            f"{hf.where}: layer_types {shown(', '.join(unknown))} not supported; supported: "
            + ", ".join(_LAYER_TYPES)
        )
    window = hf.count("sliding_window", None)
    if kind.startswith("qwen") and not hf.flag("use_sliding_window", False):
        window = None
    if window is None or kind == "llama":
        return None, ()
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
    theta = (full if "rope_theta" in full else hf).number("rope_theta", 10000.0, above=0)
    rope = {"rope_theta": float(theta), "rope_scaling": _rope_scaling(full)}
    if gemma:
        local.only(rope_type="default")
        theta = hf.number("rope_local_base_freq", above=0)
        rope["rope_local_theta"] = local.number("rope_theta", theta, above=0)
    return rope


def _rope_scaling(rope: Fields) -> RopeScaling | None:
    kind = rope.choice("rope_type" if "rope_type" in rope else "type", _ROPE_TYPES, "default")
    if kind == "default":
        return None
    factor = rope.number("factor", above=0)
    if kind == "linear":
        return RopeScaling("linear", factor)
    low = rope.number("low_freq_factor", above=0)
    high = rope.number("high_freq_factor", above=low)
    return RopeScaling("llama3", factor, low, high, rope.count("original_max_position_embeddings"))
