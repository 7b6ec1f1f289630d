"""SPLADE's models as transformers and sentence-transformers' SparseEncoder have them, both ways."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.models.retriever import Retriever
from expandr_jax.sharding import device_put
from expandr_jax.weights.export import new_directory, write_model
from expandr_jax.weights.families import BY_TYPE, model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.hf import check_length, open_model, open_tokenizer
from expandr_jax.weights.load import load_params
from expandr_jax.weights.sentence_transformers import (
    prompt_of,
    read_modules,
    read_settings,
    transformer_length,
)
from expandr_jax.weights.source import locate
from expandr_jax.weights.tokenizer import ANY_LENGTH
from expandr_jax.weights.trees import module_shardings

logger = logging.getLogger(__name__)

# Each model_type that a sparse encoder can be of.
SPARSE_MODEL_TYPES = tuple(kind for kind, family in BY_TYPE.items() if family.masked_head)
SPLADE_POOLING = "splade"  # The pooling that a retriever of this kind has.
_ORDER = ("Transformer", "SpladePooling")
_MODULES = ("MLMTransformer", "SpladePooling")  # As versions before 5.4 call them, and write them.


def load_sparse_encoder(
    source: str,
    *,
    max_length: int | None = None,
    query_length: int = 0,
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    compute_dtype: Any = jnp.float32,
    sha256: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[Retriever, dict[str, Any]]:
    """Loads BERT or its kin as SPLADE's encoder; arguments and errors as of `load_retriever`.

    Where the files have no head of a masked language model, it begins as a layer that changes
    nothing and a norm: words near a text's tokens, by the embeddings, count.

    Returns:
        A retriever whose pooling is `SPLADE_POOLING`, and its parameters.
    """
    path, files = locate(source), open_model(source, sha256)
    # A type may be anything that JSON can say.
    if files.adapter is not None or files.model_type not in SPARSE_MODEL_TYPES:
        known = ", ".join(SPARSE_MODEL_TYPES)
        raise UserError(f"{source}: a sparse encoder is a whole model of type {known}")
    prompts, said = _settings(path)
    files.config.only(tie_word_embeddings=True)
    head = BY_TYPE[files.model_type].masked_head
    config = model_config(files.config, files.model_type)
    tokenizer = open_tokenizer(files, config)
    check_length(str(path), tokenizer, config, max_length, query_length)
    module = head.module(config, compute_dtype)
    shardings = None if mesh is None else module_shardings(mesh, module)
    weights = head.weights(config, files.config, files.model_type)
    has_head = weights[-1].name in files.tensors or weights[-1].copies[0] in files.tensors
    if not has_head:
        message = "%s: no head of a masked language model; the embeddings alone take its part"
        logger.warning(message, path)
        weights = [weight for weight in weights if weight.path.startswith("encoder/")]
    params = load_params(files, module, weights, jnp.float32, shardings)
    if not has_head:
        plain = _plain_head(config)
        of_head = None if shardings is None else {name: shardings[name] for name in plain}
        params |= jax.device_put(plain) if of_head is None else device_put(plain, of_head)
    limits = config.max_positions, max_length or said or tokenizer.model_max_length, ANY_LENGTH
    retriever = Retriever(
        module=module,
        pooling=SPLADE_POOLING,
        normalize=False,
        max_length=min(limit for limit in limits if limit),
        query_prompt=prompts["query"] if query_prompt is None else query_prompt,
        document_prompt=prompts["document"] if document_prompt is None else document_prompt,
        tokenizer=tokenizer,
        files=files,
        query_length=query_length,
    )
    return retriever, params


def _plain_head(config: Any) -> dict[str, Any]:
    """A head that adds nothing to what the embeddings say."""
    width = config.hidden_size
    zeros = np.zeros(width, np.float32)
    return {
        "head_dense": {"kernel": np.eye(width, dtype=np.float32), "bias": zeros},
        "head_norm": {"scale": np.ones(width, np.float32), "bias": zeros},
        "head_bias": np.zeros(config.vocab_size, np.float32),
    }


def _settings(directory: Path) -> tuple[dict[str, str], int | None]:
    """Prompts, and the longest text if said, by sentence-transformers' files."""
    listing = directory / "modules.json"
    if listing.is_file() and "SpladePooling" not in listing.read_text(errors="replace"):
        # A retriever of the dense kind, whose encoder is taken.
        dense = read_settings(directory)
        return {"query": dense.query_prompt, "document": dense.document_prompt}, dense.max_length
    if not listing.is_file():  # Then sentence-transformers reads none of its own files.
        return {"query": "", "document": ""}, None
    own = Fields.read(directory / "config_sentence_transformers.json", optional=True)
    prompts = {name: prompt_of(own, name) for name in ("query", "document")}
    modules = read_modules(listing, _ORDER, _ORDER, {_MODULES[0]: _ORDER[0]})
    own.strict(
        *("__version__", "default_prompt_name", "prompts", "requirements"),
        model_type="SparseEncoder",
        similarity_fn_name="dot",
        max_active_dims=None,
    )
    pooling = Fields.read(modules["SpladePooling"][0] / "config.json")
    pooling.strict(
        *("embedding_dimension", "word_embedding_dimension"),
        pooling_strategy="max",
        activation_function="relu",
    )
    length = transformer_length(
        modules["Transformer"][0], "fill-mask", "logits", "token_embeddings"
    )
    return prompts, length


def export_sparse_encoder(
    directory: str | os.PathLike, retriever: Retriever, params: Mapping[str, Any], dtype: Any = None
) -> None:
    """Writes a directory that SparseEncoder loads, and `load_sparse_encoder` too.

    transformers loads it as a masked language model. Arguments and errors are those of
    `export_retriever`.
    """
    config, kind = retriever.module.config, retriever.files.model_type
    head = BY_TYPE[kind].masked_head
    types = [f"sentence_transformers.sparse_encoder.models.{name}" for name in _MODULES]
    files = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": kind}
            for number, (path, kind) in enumerate(zip(("", "1_SpladePooling"), types, strict=True))
        ],
        "1_SpladePooling/config.json": {
            "pooling_strategy": "max",
            "activation_function": "relu",
            "word_embedding_dimension": config.vocab_size,
        },
        "sentence_bert_config.json": {
            "max_seq_length": retriever.max_length,
            "do_lower_case": False,
        },
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "prompts": {"query": retriever.query_prompt, "document": retriever.document_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    }
    with new_directory(directory) as new:
        write_model(
            new,
            retriever,
            params,
            dtype,
            retriever.max_length,
            weights=head.weights(config, retriever.files.config, kind),
            prefix=head.prefixes[kind],
            architecture=BY_TYPE[kind].classes[kind][1],
        )
        (new / "1_SpladePooling").mkdir()
        for name, content in files.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
