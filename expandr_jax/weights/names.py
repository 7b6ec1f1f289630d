"""Where each Hugging Face tensor sits in our parameter trees: one table for both directions.

A PyTorch linear weight is [out, in], ours [in, out]; `{}` in a name stands for the layer's number,
which is the leading axis of our stacked parameters.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from expandr_jax.errors import UserError
from expandr_jax.models.bert import Bert, BertConfig
from expandr_jax.models.decoder import Decoder, DecoderConfig
from expandr_jax.weights.files import ModelFiles


@dataclasses.dataclass(frozen=True)
class Weight:
    """One leaf of a parameter tree and the Hugging Face tensor, or stack of tensors, it holds.

    Attributes:
        path: Keys of the leaf, joined by "/".
        name: The tensor's name without the model's prefix; `{}` is the layer's number.
        transpose: The tensor is [out, in] and the leaf [in, out].
    """

    path: str
    name: str
    transpose: bool = False

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
    weights = [
        Weight("embedding", "embed_tokens.weight"),
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


def weights_of(config: BertConfig | DecoderConfig, with_head: bool) -> list[Weight]:
    """The table of a model; `with_head` only matters to decoders whose head is untied."""
    if isinstance(config, BertConfig):
        return bert_weights()
    return decoder_weights(config, with_head)


# Prefixes under which published files keep the names above. The head never has one.
PREFIXES = ("", "model.", "bert.", "roberta.")

# Tensors that files may hold and that these models do not use.
_IGNORED = re.compile(
    r"(.*\.)?(embeddings\.position_ids|rotary_emb\.inv_freq)"
    r"|(.*\.)?pooler\.dense\.(weight|bias)"
    r"|cls\.(predictions|seq_relationship)\..*|lm_head\..*"
)


def is_ignored(name: str) -> bool:
    """Whether a tensor is a known extra: position ids, pooler, pre-training heads, unused head."""
    return _IGNORED.fullmatch(name) is not None


def load_params(
    files: ModelFiles, module: Bert | Decoder, weights: list[Weight], dtype: Any
) -> dict[str, Any]:
    """Fills a parameter tree, one leaf at a time.

    Args:
        files: The model's files.
        module: Decides the shapes.
        weights: The model's table.
        dtype: Type of the parameters.

    Returns:
        A nested dict of arrays.

    Raises:
        UserError: If a tensor is missing, unknown, wrongly shaped, or not finite.
    """
    shapes = files.shapes()
    prefix = _prefix(shapes, weights)
    expected = _leaf_shapes(module)
    parts = {
        weight.path: [
            hf_name(weight, layer, prefix)
            for layer in (range(expected[weight.path][0]) if weight.stacked else [""])
        ]
        for weight in weights
    }
    names = {name for part in parts.values() for name in part}
    _complain(files.where, "are missing", names - shapes.keys())
    _complain(files.where, "are unknown", {n for n in shapes.keys() - names if not is_ignored(n)})
    wrong = []
    for weight in weights:
        shape = expected[weight.path][1:] if weight.stacked else expected[weight.path]
        shape = shape[::-1] if weight.transpose else shape
        wrong += [
            f"{n} {shapes[n]} (expected {shape})" for n in parts[weight.path] if shapes[n] != shape
        ]
    _complain(files.where, "have the wrong shape", wrong)

    flat = {}
    for weight in weights:
        leaf = np.empty(expected[weight.path], dtype)
        for index, name in enumerate(parts[weight.path]):
            tensor = files.read(name)
            if not np.isfinite(tensor).all():
                _complain(files.where, "have NaN or infinite values", [name])
            (leaf[index] if weight.stacked else leaf)[...] = (
                tensor.T if weight.transpose else tensor
            )
        flat[weight.path] = jnp.asarray(leaf)
    return traverse_util.unflatten_dict(flat, sep="/")


def _prefix(names: Iterable[str], weights: list[Weight]) -> str:
    """The prefix under which a file keeps the embedding; the first candidate if there is none."""
    return next((p for p in PREFIXES if p + weights[0].name in names), PREFIXES[0])


def _leaf_shapes(module: Bert | Decoder) -> dict[str, tuple[int, ...]]:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    inputs = [tokens, tokens]
    if isinstance(module, Decoder):
        inputs.append(jax.ShapeDtypeStruct((1, 1, 1), jnp.bool_))
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    flat = traverse_util.flatten_dict(nn.unbox(variables["params"]), sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _complain(where: str, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise UserError(f"{where}: {len(names)} tensors {what}: {', '.join(names[:5])}{rest}")


def to_hf(params: Mapping[str, Any], weights: list[Weight], prefix: str) -> dict[str, np.ndarray]:
    """Undoes the loading: parameters to named tensors in the Hugging Face layout, types unchanged.

    Args:
        params: Parameter tree.
        weights: The model's table.
        prefix: Put before every name but the head's.

    Returns:
        Contiguous arrays by name.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for weight in weights:
        leaf = np.asarray(flat[weight.path])
        parts = enumerate(leaf) if weight.stacked else [("", leaf)]
        for layer, part in parts:
            name = hf_name(weight, layer, prefix)
            tensors[name] = np.ascontiguousarray(part.T if weight.transpose else part)
    return tensors


def hf_name(weight: Weight, layer: int | str, prefix: str) -> str:
    """The full name of a tensor in a file."""
    return ("" if weight.path == "lm_head" else prefix) + weight.name.format(layer)
