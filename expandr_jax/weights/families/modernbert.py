"""ModernBERT."""

from expandr_jax.errors import UserError
from expandr_jax.models.cross_encoder import ModernPairClassifier
from expandr_jax.models.modernbert import ModernBert, ModernBertConfig
from expandr_jax.models.rope import RopeScaling
from expandr_jax.weights.families.family import (
    ACTIVATION_NAMES,
    LAYER_TYPES,
    MOST_LAYERS,
    Family,
    PairHead,
    layer_types,
    rope_scaling,
    rope_theta,
)
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.names import Weight, layer_norm, linear

_GLOBAL, _LOCAL = LAYER_TYPES
_DEFAULTS = {
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "local_attention": 128,
    "local_rope_theta": 10_000.0,
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "vocab_size": 50368,
}


def _read(hf: Fields, kind: str) -> ModernBertConfig:
    half = hf.count("local_attention") // 2
    width = hf.quotient("hidden_size", "num_attention_heads")
    if width % 2:
        raise UserError(
            f"{hf.where}: hidden_size / num_attention_heads is {width}; expected an even number: "
            "its halves rotate together"
        )
    # A rope_scaling beside the bases means one thing to one version of transformers and another to
    # the next; sliding_window is another name of half the local attention.
    hf.only(head_dim=width, rope_scaling=None, partial_rotary_factor=1.0, sliding_window=half)
    layers = hf.count("num_hidden_layers", most=MOST_LAYERS)
    types, every = layer_types(hf, layers), hf.count("global_attn_every_n_layers")
    if types is None:
        types = [_LOCAL if layer % every else _GLOBAL for layer in range(layers)]
    theta, scaling = _rope(hf, _GLOBAL, "global_rope_theta")
    local_theta, local_scaling = _rope(hf, _LOCAL, "local_rope_theta")
    return ModernBertConfig(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("hidden_size"),
        num_layers=layers,
        num_heads=hf.count("num_attention_heads"),
        mlp_dim=hf.count("intermediate_size"),
        max_positions=hf.count("max_position_embeddings"),
        window=half + 1,
        layer_is_local=tuple(name == _LOCAL for name in types),
        activation=ACTIVATION_NAMES[
            hf.choice("hidden_activation", tuple(ACTIVATION_NAMES), "gelu")
        ],
        norm_eps=hf.number("norm_eps", above=0),
        norm_bias=hf.flag("norm_bias", False),
        attention_bias=hf.flag("attention_bias", False),
        mlp_bias=hf.flag("mlp_bias", False),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        rope_local_scaling=local_scaling,
        embedding_dropout=hf.rate("embedding_dropout", 0.0),
        attention_dropout=hf.rate("attention_dropout", 0.0),
        mlp_dropout=hf.rate("mlp_dropout", 0.0),
    )


def _rope(hf: Fields, kind: str, older: str) -> tuple[float, RopeScaling | None]:
    """Rotary base and stretching of a kind of layers: rope_parameters, or the `older` field."""
    given = hf.section("rope_parameters")
    if given.values.keys() - {*LAYER_TYPES}:
        raise hf.refuse("rope_parameters", f"an object with {' and '.join(LAYER_TYPES)} alone")
    given = given.section(kind)
    given.only(partial_rotary_factor=1.0)
    return rope_theta(given, hf, older), rope_scaling(given)


def _weights(config: ModernBertConfig, with_head: bool) -> list[Weight]:
    """The tensors of the encoder; the first layer has no norm before its attention."""
    bias = config.norm_bias
    weights = [
        Weight("embedding", "embeddings.tok_embeddings.weight"),
        *layer_norm("embedding_norm", "embeddings.norm", bias),
        *layer_norm("final_norm", "final_norm", bias),
    ]
    for ours, first in (("first_layer", 0), ("layers", 1))[: config.num_layers]:
        layer = "layers.{}."
        if first:
            weights += layer_norm(f"{ours}/attention_norm", layer + "attn_norm", bias, first=first)
        weights += layer_norm(f"{ours}/mlp_norm", layer + "mlp_norm", bias, first=first)
        for path, name, has_bias in (
            ("qkv_proj", "attn.Wqkv", config.attention_bias),
            ("o_proj", "attn.Wo", config.attention_bias),
            ("gate_up_proj", "mlp.Wi", config.mlp_bias),
            ("down_proj", "mlp.Wo", config.mlp_bias),
        ):
            weights += linear(f"{ours}/{path}", layer + name, has_bias, first=first)
    return weights


def _with_head(config: ModernBertConfig, hf: Fields) -> ModernPairClassifier:
    """The module with the head that config.json says."""
    return ModernPairClassifier(
        config,
        pooling=hf.choice("classifier_pooling", ("cls", "mean"), "cls"),
        activation=ACTIVATION_NAMES[
            hf.choice("classifier_activation", tuple(ACTIVATION_NAMES), "gelu")
        ],
        use_bias=hf.flag("classifier_bias", False),
        dropout=hf.rate("classifier_dropout", 0.0),
    )


def _head(config: ModernBertConfig, hf: Fields, kind: str) -> list[Weight]:
    return [
        *linear("pooler", "head.dense", hf.flag("classifier_bias", False), bare=True),
        *layer_norm("head_norm", "head.norm", config.norm_bias, bare=True),
        *linear("classifier", "classifier", True, bare=True),
    ]


FAMILY = Family(
    classes={"modernbert": ("ModernBertModel", "ModernBertForMaskedLM")},
    defaults={"modernbert": _DEFAULTS},
    read_config=_read,
    config=ModernBertConfig,
    module=ModernBert,
    weights=_weights,
    ignored=(r"head\..*", r"decoder\..*"),
    misnamed=("modernbert",),
    pair_head=PairHead(_with_head, _head, {"modernbert": "model."}),
)
