"""BERT and its kin: RoBERTa, XLM-RoBERTa, CamemBERT."""

import dataclasses

from expandr_jax.models.bert import Bert, BertConfig
from expandr_jax.models.cross_encoder import PairClassifier
from expandr_jax.models.splade import SpladeEncoder
from expandr_jax.weights.families.family import (
    ACTIVATION_NAMES,
    MOST_LAYERS,
    Family,
    MaskedHead,
    PairHead,
)
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.names import Weight, layer_norm, linear


def _read(hf: Fields, kind: str) -> BertConfig:
    hf.only(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    hf.quotient("hidden_size", "num_attention_heads")
    offset = 0 if kind == "bert" else hf.count("pad_token_id", least=0) + 1
    return BertConfig(
        vocab_size=hf.count("vocab_size"),
        hidden_size=hf.count("hidden_size"),
        num_layers=hf.count("num_hidden_layers", most=MOST_LAYERS),
        num_heads=hf.count("num_attention_heads"),
        mlp_dim=hf.count("intermediate_size"),
        max_positions=hf.count("max_position_embeddings", least=offset + 1) - offset,
        position_offset=offset,
        num_token_types=hf.count("type_vocab_size"),
        activation=ACTIVATION_NAMES[hf.choice("hidden_act", tuple(ACTIVATION_NAMES), "gelu")],
        norm_eps=hf.number("layer_norm_eps", above=0),
        hidden_dropout=hf.rate("hidden_dropout_prob", 0.1),
        attention_dropout=hf.rate("attention_probs_dropout_prob", 0.1),
    )


def _weights(config: BertConfig, with_head: bool) -> list[Weight]:
    """The tensors of BERT and RoBERTa encoders."""
    layer = "encoder.layer.{}."
    return [
        Weight("embedding", "embeddings.word_embeddings.weight"),
        Weight("position_embedding", "embeddings.position_embeddings.weight"),
        Weight("type_embedding", "embeddings.token_type_embeddings.weight"),
        *layer_norm("embedding_norm", "embeddings.LayerNorm"),
        *linear("layers/q_proj", layer + "attention.self.query", True),
        *linear("layers/k_proj", layer + "attention.self.key", True),
        *linear("layers/v_proj", layer + "attention.self.value", True),
        *linear("layers/o_proj", layer + "attention.output.dense", True),
        *layer_norm("layers/attention_norm", layer + "attention.output.LayerNorm"),
        *linear("layers/up_proj", layer + "intermediate.dense", True),
        *linear("layers/down_proj", layer + "output.dense", True),
        *layer_norm("layers/mlp_norm", layer + "output.LayerNorm"),
    ]


def _head(config: BertConfig, hf: Fields, kind: str) -> list[Weight]:
    """RoBERTa's head has the layer of BERT's pooler."""
    if kind == "bert":
        first, last = linear("pooler", "pooler.dense", True), "classifier"
    else:
        first = linear("pooler", "classifier.dense", True, bare=True)
        last = "classifier.out_proj"
    return [*first, *linear("classifier", last, True, bare=True)]


def _masked(config: BertConfig, hf: Fields, kind: str) -> list[Weight]:
    """The tensors of the encoder and of the masked language model's head."""
    if kind == "bert":
        dense, norm, where = "transform.dense", "transform.LayerNorm", "cls.predictions."
    else:
        hf.only(hidden_act="gelu")  # Their heads have it, whatever the layers have.
        dense, norm, where = "dense", "layer_norm", "lm_head."
    encoder = [
        dataclasses.replace(
            weight,
            path=f"encoder/{weight.path}",
            copies=(f"{where}decoder.weight",) if weight.path == "embedding" else (),
        )
        for weight in _weights(config, False)
    ]
    return [
        *encoder,
        *linear("head_dense", where + dense, True, bare=True),
        *layer_norm("head_norm", where + norm, bare=True),
        Weight("head_bias", f"{where}bias", copies=(f"{where}decoder.bias",), bare=True),
    ]


# What stands before the encoder's names in files that have a head.
_PREFIXES = {"bert": "bert.", **dict.fromkeys(("camembert", "roberta", "xlm-roberta"), "roberta.")}
_ROBERTA = {"layer_norm_eps": 1e-12, "type_vocab_size": 2}
FAMILY = Family(
    classes={
        "bert": ("BertModel", "BertForMaskedLM"),
        "camembert": ("CamembertModel", "CamembertForMaskedLM"),
        "roberta": ("RobertaModel", "RobertaForMaskedLM"),
        "xlm-roberta": ("XLMRobertaModel", "XLMRobertaForMaskedLM"),
    },
    defaults=dict.fromkeys(("bert", "camembert", "roberta", "xlm-roberta"), _ROBERTA),
    read_config=_read,
    config=BertConfig,
    module=Bert,
    weights=_weights,
    prefixes=("", "model.", *dict.fromkeys(_PREFIXES.values())),
    ignored=(
        r"(.*\.)?embeddings\.position_ids",
        r"(.*\.)?pooler\.dense\.(weight|bias)",
        r"cls\.(predictions|seq_relationship)\..*",
        r"lm_head\..*",
    ),
    tokenizer_classes={
        "bert": "BertTokenizer",
        "camembert": "CamembertTokenizer",
        "roberta": "RobertaTokenizer",
        "xlm-roberta": "XLMRobertaTokenizer",
    },
    pair_head=PairHead(lambda config, hf: PairClassifier(config), _head, _PREFIXES),
    masked_head=MaskedHead(SpladeEncoder, _masked, _PREFIXES),
)
