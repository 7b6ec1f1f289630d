"""T5 encoders (GTR, sentence-T5)."""

from typing import Any

from expandr_jax.models.t5 import T5Config, T5Encoder
from expandr_jax.weights.families.family import MOST_LAYERS, Family
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.names import Weight, linear

_FEED_FORWARDS = ("relu", "gated-gelu")
DEFAULTS = {
    "dropout_rate": 0.1,
    "feed_forward_proj": "relu",
    "layer_norm_epsilon": 1e-06,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
}


def _read(hf: Fields, kind: str) -> T5Config:
    buckets = hf.count("relative_attention_num_buckets", least=4)
    return T5Config(
        head_dim=hf.count("d_kv"),
        num_buckets=buckets,
        # The near quarter of the buckets has a distance each; the farthest lies beyond.
        max_distance=hf.count("relative_attention_max_distance", least=buckets // 4 + 1),
        **read_encoder(hf),
    )


def read_encoder(hf: Fields) -> dict[str, Any]:
    """The fields of a configuration that mean the same to all who call themselves T5."""
    gated = hf.choice("feed_forward_proj", _FEED_FORWARDS) == "gated-gelu"
    # What transformers makes of that; where a file says otherwise, it obeys the file.
    hf.only(dense_act_fn="gelu_new" if gated else "relu", is_gated_act=gated)
    return {
        "vocab_size": hf.count("vocab_size"),
        "hidden_size": hf.count("d_model"),
        "num_layers": hf.count("num_layers", most=MOST_LAYERS),
        "num_heads": hf.count("num_heads"),
        "mlp_dim": hf.count("d_ff"),
        "gated": gated,
        "norm_eps": hf.number("layer_norm_epsilon", above=0),
        "dropout": hf.rate("dropout_rate"),
    }


def _weights(config: T5Config, with_head: bool) -> list[Weight]:
    """The tensors of a T5 encoder."""
    layer = "encoder.block.{}.layer."
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights = [
        Weight("embedding", "shared.weight", copies=("encoder.embed_tokens.weight",)),
        Weight("relative_bias", bias),
        Weight("layers/input_norm/scale", layer + "0.layer_norm.weight"),
        Weight("layers/mlp_norm/scale", layer + "1.layer_norm.weight"),
        Weight("final_norm/scale", "encoder.final_layer_norm.weight"),
    ]
    for letter in "qkvo":
        name = f"{layer}0.SelfAttention.{letter}"
        weights += linear(f"layers/{letter}_proj", name, False)
    for ours, name in feed_forward_names(config.gated):
        weights += linear(f"layers/{ours}", f"{layer}1.DenseReluDense.{name}", False)
    return weights


def feed_forward_names(gated: bool) -> list[tuple[str, str]]:
    if gated:
        return [("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")]
    return [("up_proj", "wi"), ("down_proj", "wo")]


FAMILY = Family(
    classes={"t5": ("T5EncoderModel", "T5ForConditionalGeneration")},
    defaults={"t5": DEFAULTS},
    read_config=_read,
    config=T5Config,
    module=T5Encoder,
    weights=_weights,
    ignored=(r"decoder\..*", r"lm_head\..*"),
    tokenizer_classes={"t5": "T5Tokenizer"},
)
