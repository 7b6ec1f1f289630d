"""Hugging Face's config.json to our model configurations, and what of it is supported."""

from collections.abc import Mapping
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.models.anchordr import AnchorDrConfig
from expandr_jax.models.bert import BertConfig
from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.models.rope import RopeScaling
from expandr_jax.models.t5 import T5Config
from expandr_jax.weights.names import ModelConfig

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

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


def model_config(hf: Mapping[str, Any], kind: str | None, where: str) -> ModelConfig:
    """Reads a Hugging Face configuration.

    Args:
        hf: The parsed config.json.
        kind: Its model_type, or "anchordr".
        where: Named in messages.

    Returns:
        The configuration of the module that computes the same function.

    Raises:
        UserError: If the type or an option of the model is not supported, or a field is missing.
    """
    if kind not in ENCODERS + DECODERS:
        known = ", ".join(ENCODERS + DECODERS)
        raise UserError(f"{where}: model_type {kind!r} is not supported; supported: {known}")
    if hf.get("quantization_config"):
        raise UserError(
            f"{where}: quantization_config says that the weights are quantized; take the model "
            "before that, or a GGUF file"
        )
    defaults = _DEFAULTS.get({"anchordr": "t5"}.get(kind, kind), _DEFAULTS["roberta"])
    # A null means the default, but for the window, where it means none.
    given = {key: hf[key] for key in hf if hf[key] is not None or key == "sliding_window"}
    hf = {**defaults, **given}
    try:
        if kind in _BERTS:
            return _bert(hf, where)
        if kind == "t5":
            return _t5(hf, where)
        return _anchordr(hf, where) if kind == "anchordr" else _decoder(hf, where)
    except KeyError as missing:
        raise UserError(f"{where}: field {missing} is missing") from None


def _bert(hf: Mapping[str, Any], where: str) -> BertConfig:
    _refuse(hf, where, is_decoder=False, position_embedding_type="absolute")
    offset = 0 if hf["model_type"] == "bert" else hf["pad_token_id"] + 1
    return BertConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"] - offset,
        position_offset=offset,
        num_token_types=hf["type_vocab_size"],
        activation=_activation(hf.get("hidden_act", "gelu"), where),
        norm_eps=hf["layer_norm_eps"],
        hidden_dropout=hf.get("hidden_dropout_prob", 0.1),
        attention_dropout=hf.get("attention_probs_dropout_prob", 0.1),
    )


def _t5(hf: Mapping[str, Any], where: str) -> T5Config:
    return T5Config(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["d_model"],
        num_layers=hf["num_layers"],
        num_heads=hf["num_heads"],
        head_dim=hf["d_kv"],
        mlp_dim=hf["d_ff"],
        gated=_gated(hf, where),
        num_buckets=hf["relative_attention_num_buckets"],
        max_distance=hf["relative_attention_max_distance"],
        norm_eps=hf["layer_norm_epsilon"],
        dropout=hf["dropout_rate"],
    )


def _anchordr(hf: Mapping[str, Any], where: str) -> AnchorDrConfig:
    _refuse(hf, where, d_kv=hf["d_model"] // hf["num_heads"], pad_token_id=1)
    return AnchorDrConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["d_model"],
        num_layers=hf["num_layers"],
        num_decoder_layers=hf.get("num_decoder_layers", hf["num_layers"]),
        num_heads=hf["num_heads"],
        mlp_dim=hf["d_ff"],
        gated=_gated(hf, where),
        num_buckets=hf["relative_attention_num_buckets"],
        norm_eps=hf["layer_norm_epsilon"],
        dropout=hf["dropout_rate"],
    )


def _gated(hf: Mapping[str, Any], where: str) -> bool:
    kind = hf["feed_forward_proj"]
    if kind not in ("relu", "gated-gelu"):
        raise UserError(
            f"{where}: feed_forward_proj {kind!r} is not supported; supported: relu, gated-gelu"
        )
    return kind == "gated-gelu"


def _decoder(hf: Mapping[str, Any], where: str) -> DecoderConfig:
    kind = hf["model_type"]
    gemma = kind == "gemma3_text"
    _refuse(hf, where, mlp_bias=False, final_logit_softcapping=None, attn_logit_softcapping=None)
    _refuse(hf, where, attention_bias=False, use_bidirectional_attention=False)
    heads, layers = hf["num_attention_heads"], hf["num_hidden_layers"]
    window, is_local = _sliding(hf, where)
    rope = _rope(hf)
    local_theta = rope["sliding_attention"]["rope_theta"] if gemma else None
    rope = rope["full_attention"]
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads", heads),
        head_dim=hf.get("head_dim", hf["hidden_size"] // heads),
        mlp_dim=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        activation=_activation(hf.get("hidden_activation", hf.get("hidden_act", "silu")), where),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope, where),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind in ("gemma3_text", "qwen3"),
        norm_plus_one=gemma,
        post_norms=gemma,
        scale_embeddings=gemma,
        query_scale=hf["query_pre_attn_scalar"] ** -0.5 if gemma else None,
        sliding_window=window,
        layer_is_local=is_local,
        rope_local_theta=local_theta,
    )


def _sliding(hf: Mapping[str, Any], where: str) -> tuple[int | None, tuple[bool, ...]]:
    """Width of the local attention and which layers use it."""
    kind, layers, window = hf["model_type"], hf["num_hidden_layers"], hf.get("sliding_window")
    if kind.startswith("qwen") and not hf.get("use_sliding_window", False):
        window = None
    if window is None or kind == "llama":
        return None, ()
    if "layer_types" in hf:
        is_local = tuple(kind == "sliding_attention" for kind in hf["layer_types"])
    elif kind == "gemma3_text":
        every = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
        is_local = tuple((layer + 1) % every != 0 for layer in range(layers))
    elif kind == "mistral":
        is_local = (True,) * layers
    else:
        is_local = tuple(layer >= hf.get("max_window_layers", 28) for layer in range(layers))
    if len(is_local) != layers:
        raise UserError(f"{where}: layer_types has {len(is_local)} entries for {layers} layers")
    return window, is_local


def _rope(hf: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer, from the present form (rope_parameters) or the older."""
    given = hf.get("rope_parameters")
    if given is None:
        full = {"rope_theta": hf.get("rope_theta", 10000.0), **(hf.get("rope_scaling") or {})}
        local = {"rope_theta": hf.get("rope_local_base_freq", full["rope_theta"])}
        return {"full_attention": full, "sliding_attention": local}
    if "full_attention" in given:
        return dict(given)
    full = {"rope_theta": hf.get("rope_theta", 10000.0), **given}
    local = {"rope_theta": hf.get("rope_local_base_freq", full["rope_theta"])}
    return {"full_attention": full, "sliding_attention": local}


def _rope_scaling(rope: Mapping[str, Any], where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
    raise UserError(
        f"{where}: rope_type {kind!r} is not supported; supported: default, linear, llama3"
    )


def _activation(name: str, where: str) -> str:
    if name not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UserError(f"{where}: activation {name!r} is not supported; supported: {known}")
    return _ACTIVATIONS[name]


def _refuse(hf: Mapping[str, Any], where: str, **only: Any) -> None:
    """Options that change the function and that only one value of is implemented."""
    for field, value in only.items():
        if hf.get(field, value) != value:
            raise UserError(f"{where}: {field}={hf[field]!r} is not supported; only {value!r} is")
