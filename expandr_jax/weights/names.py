"""Where each Hugging Face tensor sits in our parameter trees: one table for both directions.

A PyTorch linear weight is [out, in], ours [in, out]; `{}` in a name stands for the layer's number,
which is the leading axis of our stacked parameters.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from expandr_jax.models.anchordr import AnchorDrConfig
from expandr_jax.models.bert import BertConfig
from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.models.t5 import T5Config

ModelConfig = BertConfig | T5Config | AnchorDrConfig | DecoderConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One leaf of a parameter tree and the Hugging Face tensor, or stack of tensors, it holds.

    Attributes:
        path: Keys of the leaf, joined by "/".
        name: The tensor's name without the model's prefix; `{}` is the layer's number.
        transpose: The tensor is [out, in] and the leaf [in, out].
        copies: Names under which files may hold the same tensor again, or instead.
    """

    path: str
    name: str
    transpose: bool = False
    copies: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def _linear(path: str, name: str, bias: bool) -> Iterator[Weight]:
    yield Weight(f"{path}/kernel", f"{name}.weight", transpose=True)
    if bias:
        yield Weight(f"{path}/bias", f"{name}.bias")


def _layer_norm(path: str, name: str) -> Iterator[Weight]:
    yield Weight(f"{path}/scale", f"{name}.weight")
    yield Weight(f"{path}/bias", f"{name}.bias")


def bert_weights() -> list[Weight]:
    """The tensors of BERT and RoBERTa encoders."""
    layer = "encoder.layer.{}."
    return [
        Weight("embedding", "embeddings.word_embeddings.weight"),
        Weight("position_embedding", "embeddings.position_embeddings.weight"),
        Weight("type_embedding", "embeddings.token_type_embeddings.weight"),
        *_layer_norm("embedding_norm", "embeddings.LayerNorm"),
        *_linear("layers/q_proj", layer + "attention.self.query", True),
        *_linear("layers/k_proj", layer + "attention.self.key", True),
        *_linear("layers/v_proj", layer + "attention.self.value", True),
        *_linear("layers/o_proj", layer + "attention.output.dense", True),
        *_layer_norm("layers/attention_norm", layer + "attention.output.LayerNorm"),
        *_linear("layers/up_proj", layer + "intermediate.dense", True),
        *_linear("layers/down_proj", layer + "output.dense", True),
        *_layer_norm("layers/mlp_norm", layer + "output.LayerNorm"),
    ]


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
        weights += _linear(f"layers/self_attn/{name}", attention + name, config.qkv_bias)
    weights += _linear("layers/self_attn/o_proj", attention + "o_proj", False)
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            weights.append(Weight(f"layers/self_attn/{name}/scale", f"{attention}{name}.weight"))
    for name in ("gate_proj", "up_proj", "down_proj"):
        weights += _linear(f"layers/mlp/{name}", mlp + name, False)
    if with_head and not config.tie_embeddings:
        weights.append(Weight("lm_head", "lm_head.weight", transpose=True))
    return weights


def t5_weights(config: T5Config) -> list[Weight]:
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
        weights += _linear(f"layers/{letter}_proj", name, False)
    for ours, name in _t5_mlp(config.gated):
        weights += _linear(f"layers/{ours}", f"{layer}1.DenseReluDense.{name}", False)
    return weights


def _t5_mlp(gated: bool) -> list[tuple[str, str]]:
    if gated:
        return [("gate_proj", "wi_0"), ("up_proj", "wi_1"), ("down_proj", "wo")]
    return [("up_proj", "wi"), ("down_proj", "wo")]


def anchordr_weights(config: AnchorDrConfig) -> list[Weight]:
    """The tensors of AnchorDR's encoder and decoder."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    weights = [Weight("embedding", "shared.weight", copies=copies)]
    encoder_blocks = [("self_attn", "attention_norm", "SelfAttention")]
    decoder_blocks = [*encoder_blocks, ("cross_attn", "cross_norm", "EncDecAttention")]
    for stack, blocks in (("encoder", encoder_blocks), ("decoder", decoder_blocks)):
        layer, ours = f"{stack}.block.{{}}.layer.", f"{stack}/layers/"
        weights.append(Weight(f"{stack}/position_embedding", f"{stack}.pos_embed.weight"))
        weights += _layer_norm(f"{stack}/embedding_norm", f"{stack}.first_layer_norm")
        if stack == "encoder":
            bias = layer + "0.SelfAttention.relative_attention_bias.weight"
            weights.append(Weight(ours + "relative_bias", bias))
        for index, (module, norm, name) in enumerate(blocks):
            for letter in "qkvo":
                path = f"{ours}{module}/{letter}_proj"
                weights += _linear(path, f"{layer}{index}.{name}.{letter}", True)
            weights += _layer_norm(ours + norm, f"{layer}{index}.layer_norm")
        last = f"{layer}{len(blocks)}."
        for path, name in _t5_mlp(config.gated):
            weights += _linear(ours + path, f"{last}DenseReluDense.{name}", not config.gated)
        weights += _layer_norm(ours + "mlp_norm", last + "layer_norm")
    return weights


def weights_of(config: ModelConfig, with_head: bool) -> list[Weight]:
    """The table of a model; `with_head` only matters to decoders whose head is untied."""
    if isinstance(config, BertConfig):
        return bert_weights()
    if isinstance(config, T5Config):
        return t5_weights(config)
    if isinstance(config, AnchorDrConfig):
        return anchordr_weights(config)
    return decoder_weights(config, with_head)


# Prefixes under which published files keep the names above. The head never has one.
PREFIXES = ("", "model.", "bert.", "roberta.")

# Tensors that files may hold and that these models do not use.
_IGNORED = re.compile(
    r"(.*\.)?(embeddings\.position_ids|rotary_emb\.inv_freq)"
    r"|(.*\.)?pooler\.dense\.(weight|bias)"
    r"|cls\.(predictions|seq_relationship)\..*|lm_head\..*"
)


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor is a known extra: position ids, pooler, pre-training heads, unused head."""
    unused_decoder = isinstance(config, T5Config) and name.startswith("decoder.")
    return unused_decoder or _IGNORED.fullmatch(name) is not None


def find_prefix(names: Iterable[str], weights: list[Weight]) -> str:
    """The prefix under which a file keeps the embedding; the first candidate if there is none."""
    return next((p for p in PREFIXES if p + weights[0].name in names), PREFIXES[0])


def hf_name(weight: Weight, layer: int | str, prefix: str) -> str:
    """The full name of a tensor in a file."""
    return ("" if weight.path == "lm_head" else prefix) + weight.name.format(layer)
