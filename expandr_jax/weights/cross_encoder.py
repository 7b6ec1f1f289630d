"""Cross-encoders: BERT, its kin and ModernBERT with the head of a sequence classification."""

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from expandr_jax.errors import UserError
from expandr_jax.models.cross_encoder import CrossEncoder
from expandr_jax.weights.export import new_directory, write_model
from expandr_jax.weights.families import BY_TYPE, model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.files import ModelFiles
from expandr_jax.weights.hf import open_model, open_tokenizer
from expandr_jax.weights.load import leaf_shapes, load_params
from expandr_jax.weights.names import Weight, hf_name
from expandr_jax.weights.sentence_transformers import read_modules, transformer_length
from expandr_jax.weights.source import locate

_OLDER = "sbert_ce_default_activation_function"
# Each model_type that a cross-encoder can be of.
PAIR_MODEL_TYPES = tuple(kind for kind, family in BY_TYPE.items() if family.pair_head)
# The names of PyTorch's classes in the files of sentence-transformers.
_CLASSES = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}


def load_cross_encoder(
    source: str, *, max_length: int | None = None, seed: int | None = None
) -> tuple[CrossEncoder, dict[str, Any]]:
    """Loads a re-ranker as sentence-transformers' CrossEncoder has it.

    Args:
        source: A directory, "package:NAME/PATH", or a hub id.
        max_length: Most tokens of a pair; None: what the model and its tokenizer allow.
        seed: What a head is drawn by where the files have none, for training; None: one is wanted.

    Returns:
        The cross-encoder and its parameters, float32.

    Raises:
        UserError: If the source is not there, is of another family, or has another head than one
            label's.
    """
    files = open_model(source)
    where = files.config.where
    # A type may be anything that JSON can say.
    kind, known = files.model_type, ", ".join(PAIR_MODEL_TYPES)
    if files.adapter is not None or kind not in PAIR_MODEL_TYPES:
        raise UserError(f"{source}: a cross-encoder is a whole model of type {known}")
    labels = files.config.section("id2label").values or {}
    config = model_config(files.config, kind)
    weights = _weights(config, kind, files.config)
    own = [weight for weight in weights if weight.name.startswith("classifier")]
    fresh = seed is not None and not any(weight.name in files.tensors for weight in own)
    if "id2label" in files.config and len(labels) != 1 and not fresh:
        raise UserError(f"{where}: id2label has {len(labels)} labels; expected the one of a score")
    module = BY_TYPE[kind].pair_head.module(config, files.config)
    if fresh:
        lacking = {w.path for w in weights if not _there(w, files)} & _head(weights)
        weights = [weight for weight in weights if weight.path not in lacking]
    params = load_params(files, module, weights, jnp.float32)
    if fresh:
        params = _with_head(params, leaf_shapes(module), lacking, seed)
    tokenizer = open_tokenizer(files, config)
    directory = locate(source)
    activation, own_length = ("identity", None) if fresh else _settings(files.config, directory)
    limits = (config.max_positions, max_length, own_length or tokenizer.model_max_length)
    length = min(limit for limit in limits if limit)
    if length <= tokenizer.num_special_tokens_to_add(pair=True) + 1:
        raise UserError(f"{source}: max_length is {length}; no pair of texts fits into it")
    encoder = CrossEncoder(module, tokenizer, length, activation, files)
    ((_, types),) = encoder.token_ids("a", ["b"])
    if max(types) >= getattr(config, "num_token_types", 1):
        raise UserError(
            f"{where}: type_vocab_size is {config.num_token_types}, but the tokenizer marks the "
            f"second text of a pair by {max(types)}: one of the two is another model's"
        )
    return encoder, params


def _there(weight: Weight, files: ModelFiles) -> bool:
    prefixes = BY_TYPE[files.model_type].prefixes
    return any(hf_name(weight, 0, prefix) in files.tensors for prefix in prefixes)


def _head(weights: Sequence[Weight]) -> set[str]:
    return {weight.path for weight in weights if not weight.path.startswith("encoder/")}


def _with_head(
    params: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], paths: Collection[str], seed: int
) -> dict[str, Any]:
    """Parameters with a head as transformers draws one: kernels by a normal of deviation 0.02."""
    rng, flat = np.random.default_rng(seed), traverse_util.flatten_dict(params, sep="/")
    for path in sorted(paths):
        draw = {"kernel": lambda s: rng.normal(0, 0.02, s), "scale": np.ones, "bias": np.zeros}
        flat[path] = jnp.asarray(draw[path.rpartition("/")[2]](shapes[path]), jnp.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def _weights(config: Any, kind: str, hf: Fields) -> Sequence[Weight]:
    """An encoder's tensors and those of its head."""
    family = BY_TYPE[kind]
    encoder = [
        dataclasses.replace(weight, path=f"encoder/{weight.path}")
        for weight in family.weights(config, False)
    ]
    return [*encoder, *family.pair_head.weights(config, hf, kind)]


def _settings(config: Fields, directory: Path) -> tuple[str, int | None]:
    """What is applied to a logit, and the longest pair if said, by sentence-transformers' files."""
    own = Fields.read(directory / "config_sentence_transformers.json", optional=True)
    listing, length = directory / "modules.json", None
    if listing.is_file() and own.text("model_type", None) == "CrossEncoder":
        # The default prompt would stand before every query.
        own.strict(
            *("__version__", "activation_fn", "keep_in_fp32_modules", "model_type", "prompts"),
            "requirements",
            default_prompt_name=None,
        )
        read_modules(listing, ("Transformer",), ("Transformer",))
        length = transformer_length(directory, "sequence-classification", "logits", "scores")
    else:  # It takes the transformer's own files of another model, or where there is no list.
        own = Fields({}, own.where)
    for fields, name in (
        (own, "activation_fn"),
        (config.section("sentence_transformers"), "activation_fn"),
        (config, _OLDER),
    ):
        if name in fields:
            return _CLASSES[fields.choice(name, tuple(_CLASSES))], length
    return "sigmoid", length  # What sentence-transformers does with one label.


def export_cross_encoder(
    directory: str | os.PathLike,
    encoder: CrossEncoder,
    params: Mapping[str, Any],
    dtype: Any = None,
) -> None:
    """Writes a directory that sentence-transformers' CrossEncoder and `load_cross_encoder` load.

    transformers loads it as a sequence classification. Arguments and errors are those of
    `export_retriever`.
    """
    files, kind = encoder.files, encoder.files.model_type
    name = next(name for name, kind in _CLASSES.items() if kind == encoder.activation)
    # Its own field, which all versions from 4 on read; one of older ones would stand against it.
    config = {n: v for n, v in files.config.values.items() if n != _OLDER}
    config |= {
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "sentence_transformers": {"activation_fn": name},
    }
    written = dataclasses.replace(
        encoder, files=dataclasses.replace(files, config=Fields(config, files.config.where))
    )
    shape, family = encoder.module.config, BY_TYPE[kind]
    with new_directory(directory) as new:
        write_model(
            new,
            written,
            params,
            dtype,
            encoder.max_length,
            weights=_weights(shape, kind, files.config),
            prefix=family.pair_head.prefixes[kind],
            architecture=family.classes[kind][1].replace(
                "ForMaskedLM", "ForSequenceClassification"
            ),
        )
