"""Loads cross-encoders: BERT and its kin with the head of a sequence classification."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from expandr_jax.errors import UserError
from expandr_jax.models.bert import BertConfig
from expandr_jax.models.cross_encoder import CrossEncoder, PairClassifier
from expandr_jax.weights.families import bert, model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.hf import open_model, open_tokenizer
from expandr_jax.weights.load import load_params
from expandr_jax.weights.names import Weight, linear
from expandr_jax.weights.sentence_transformers import read_modules, transformer_length
from expandr_jax.weights.source import locate

# The names of PyTorch's classes in the files of sentence-transformers.
_ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
}


def load_cross_encoder(
    source: str, *, max_length: int | None = None
) -> tuple[CrossEncoder, dict[str, Any]]:
    """Loads a re-ranker as sentence-transformers' CrossEncoder has it.

    Args:
        source: A directory, "package:NAME/PATH", or a hub id.
        max_length: Most tokens of a pair; None: what the model and its tokenizer allow.

    Returns:
        The cross-encoder and its parameters, float32.

    Raises:
        UserError: If the source is not there, is of another family, or has another head than one
            label's.
    """
    files = open_model(source)
    where = files.config.where
    # A type may be anything that JSON can say.
    if files.adapter is not None or files.model_type not in tuple(bert.FAMILY.classes):
        known = ", ".join(bert.FAMILY.classes)
        raise UserError(f"{source}: a cross-encoder is a whole model of type {known}")
    labels = files.config.section("id2label").values or {}
    if "id2label" in files.config and len(labels) != 1:
        raise UserError(f"{where}: id2label has {len(labels)} labels; expected the one of a score")
    config = model_config(files.config, files.model_type)
    has_pooler = any("pooler" in name.split(".") for name in files.tensors)
    module = PairClassifier(config)
    params = load_params(files, module, _weights(config, has_pooler), jnp.float32)
    tokenizer = open_tokenizer(files, config)
    directory = locate(source)
    activation, own_length = _settings(files.config, directory)
    limits = (config.max_positions, max_length, own_length or tokenizer.model_max_length)
    length = min(limit for limit in limits if limit)
    if length <= tokenizer.num_special_tokens_to_add(pair=True) + 1:
        raise UserError(f"{source}: max_length is {length}; no pair of texts fits into it")
    encoder = CrossEncoder(module, tokenizer, length, activation)
    ((_, types),) = encoder.token_ids("a", ["b"])
    if max(types) >= config.num_token_types:
        raise UserError(
            f"{where}: type_vocab_size is {config.num_token_types}, but the tokenizer marks the "
            f"second text of a pair by {max(types)}: one of the two is another model's"
        )
    return encoder, params


def _weights(config: BertConfig, has_pooler: bool) -> Sequence[Weight]:
    """BERT's tensors and those of its head, or RoBERTa's, whose head has the pooler's layer."""
    encoder = [
        dataclasses.replace(weight, path=f"encoder/{weight.path}")
        for weight in bert.FAMILY.weights(config, False)
    ]
    if has_pooler:
        first, last = list(linear("pooler", "pooler.dense", True)), "classifier"
    else:
        first = list(linear("pooler", "classifier.dense", True, bare=True))
        last = "classifier.out_proj"
    return [*encoder, *first, *linear("classifier", last, True, bare=True)]


def _settings(config: Fields, directory: Path) -> tuple[str, int | None]:
    """What is applied to a logit, and the longest pair if said, by sentence-transformers' files."""
    own = Fields.read(directory / "config_sentence_transformers.json", optional=True)
    listing, length = directory / "modules.json", None
    kind = "SentenceTransformer" if listing.is_file() else "CrossEncoder"
    if own.text("model_type", kind) == "CrossEncoder":
        # The default prompt would stand before every query.
        own.strict(
            *("__version__", "activation_fn", "keep_in_fp32_modules", "model_type", "prompts"),
            "requirements",
            default_prompt_name=None,
        )
        if listing.is_file():
            read_modules(listing, ("Transformer",), ("Transformer",))
        length = transformer_length(directory, "sequence-classification", "logits", "scores")
    else:  # It takes the transformer's own files of such a model, and nothing else.
        own = Fields({}, own.where)
    for fields, name in (
        (own, "activation_fn"),
        (config.section("sentence_transformers"), "activation_fn"),
        (config, "sbert_ce_default_activation_function"),
    ):
        if name in fields:
            return _ACTIVATIONS[fields.choice(name, tuple(_ACTIVATIONS))], length
    return "sigmoid", length  # What sentence-transformers does with one label.
