"""LLaRA's two suffixes: a question, and eight tokens of its own that stand for the answer."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.models.pooling import BLOCK_TOKENS
from expandr_jax.models.retriever import Kind
from expandr_jax.weights.families import find_family, model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.files import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A passage is asked what it says; a query, what the text says that follows it.
BLOCK_PROMPTS: dict[Kind, str] = {
    "document": "\nThis text in eight words:",
    "query": "\nThe text that follows in eight words:",
}
_NAMES = {"document": "own", "query": "next"}
_TABLES = ("embed_tokens.weight", "lm_head.weight")
_DRAWN = 8  # Rows whose mean a new one begins as.


def block_tokens(kind: Kind) -> list[str]:
    """The `BLOCK_TOKENS` tokens behind texts of a kind."""
    return [f"<|{_NAMES[kind]}-{number}|>" for number in range(BLOCK_TOKENS)]


def suffix_ids(tokenizer: "PreTrainedTokenizerFast", kind: Kind) -> tuple[int, ...]:
    """All that stands behind texts of a kind, as ids of a tokenizer that has these tokens."""
    asked = tokenizer(BLOCK_PROMPTS[kind], add_special_tokens=False)["input_ids"]
    return (*asked, *tokenizer.convert_tokens_to_ids(block_tokens(kind)))


def with_blocks(files: ModelFiles, trained: bool = False) -> ModelFiles:
    """A decoder's files as if they had the tokens of both suffixes.

    Tokens that are there stay. The row of a new one is the mean of some others, the same ones each
    time; the files themselves stay as they are.

    Raises:
        UserError: The model is no decoder with a causal mask, or `trained` and lacks one of them.
    """
    from transformers import AddedToken

    where, config = files.config.where, model_config(files.config, files.model_type)
    if not (find_family(where, files.model_type).generates and config.causal):
        raise UserError(f"{where}: retriever.pooling 'block' is for decoders with a causal mask")
    tokenizer = files.tokenizer()
    tokens = [token for kind in BLOCK_PROMPTS for token in block_tokens(kind)]
    if trained and (missing := [token for token in tokens if token not in tokenizer.get_vocab()]):
        raise UserError(
            f"{where}: the pooling is 'block', but the tokenizer lacks {missing[0]}: it is another "
            "model's"
        )
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    before = config.vocab_size
    size = max(before, 1 + max(tokenizer.convert_tokens_to_ids(tokens)))
    tables = {name for name in files.tensors if name.endswith(_TABLES)} if size > before else set()

    @functools.cache
    def new_rows(name: str) -> np.ndarray:
        drawn = np.random.default_rng(0).integers(before, size=(size - before, _DRAWN))
        rows = [[files.read(name, slice(i, i + 1))[0] for i in row] for row in drawn.tolist()]
        return np.mean(np.asarray(rows, np.float32), axis=1).astype(files.tensors[name].dtype)

    def read(name: str, rows: slice) -> np.ndarray:
        if name not in tables:
            return files.read(name, rows)
        start, stop, _ = rows.indices(size)
        parts = [new_rows(name)[max(start - before, 0) : max(stop - before, 0)]]
        if start < before:
            parts.insert(0, files.read(name, slice(start, min(stop, before))))
        return np.concatenate(parts)

    def grown(tensor: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rows = tensor.shape[0] + size - before
        return jax.ShapeDtypeStruct((rows, *tensor.shape[1:]), tensor.dtype)

    return dataclasses.replace(
        files,
        config=Fields({**files.config.values, "vocab_size": size}, where),
        tensors={n: grown(t) if n in tables else t for n, t in files.tensors.items()},
        read=read,
        tokenizer=lambda: tokenizer,
    )
