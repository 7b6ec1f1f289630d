"""A text encoder with all that its vectors depend on: module, pooling, prompts and tokenizer."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax

from expandr_jax.files.records import hash_json
from expandr_jax.models.identity import module_identity, tokenizer_identity
from expandr_jax.models.lora import COLLECTION, split_adapter
from expandr_jax.models.pooling import Pooling, dense, dense_name, l2_normalize, pool
from expandr_jax.models.token_ids import check_ids

Kind = Literal["query", "document"]
TOKENIZED = 1024  # Texts at once: what a tokenizer says of one takes fifty times its letters.


@dataclasses.dataclass(frozen=True)
class Retriever:
    """Maps texts to vectors; parameters are passed in, never kept.

    Attributes:
        module: The encoder, or a decoder used as one.
        pooling: From token vectors to the text's.
        normalize: Whether vectors are scaled to length one.
        max_length: Longest input in tokens, special ones included; longer texts lose their end.
        query_prompt: Put before queries.
        document_prompt: Put before documents, and before passages written for a query.
        tokenizer: Text to ids: one of transformers, or one that is called as those are.
        files: The `ModelFiles` that it is from: an export keeps what its config.json says.
        query_length: Longest query in tokens, its prompt and special ones included; 0: as the
            others.
        query_suffix: Token ids behind each query, which are never cut.
        document_suffix: The same of documents and passages.
        dense: Activations of the layers between pooling and normalisation; the parameters of each
            are `params[dense_name(number)]`.
    """

    module: nn.Module
    pooling: Pooling
    normalize: bool
    max_length: int
    query_prompt: str
    document_prompt: str
    tokenizer: Any
    files: Any
    dense: tuple[str, ...] = ()
    query_length: int = 0
    query_suffix: tuple[int, ...] = ()
    document_suffix: tuple[int, ...] = ()

    @functools.cached_property
    def identity(self) -> str:
        """sha256 over all that vectors depend on, but for the parameters and the text."""
        tokenizer = tokenizer_identity(self.tokenizer)
        prompts = self.query_prompt, self.document_prompt
        ends = self.pooling, "+".join(self.dense) or None, self.normalize, self.max_length
        lora = self.module.lora
        added = [] if lora is None else [lora.scale]
        if self.query_length:
            added.append(["query_length", self.query_length])
        if self.query_suffix or self.document_suffix:
            added.append(["suffixes", self.query_suffix, self.document_suffix])
        return hash_json([module_identity(self.module), tokenizer, prompts, ends, *added])

    def prompt(self, kind: Kind) -> str:
        """What is put before each text of a kind."""
        return {"query": self.query_prompt, "document": self.document_prompt}[kind]

    def token_ids(
        self,
        texts: Sequence[str],
        kind: Kind | None = None,
        cut: Callable[[Sequence[bool]], None] | None = None,
    ) -> list[list[int]]:
        """Tokenizes texts as sentence-transformers does, with special tokens, without padding.

        Args:
            texts: Any strings; white space around them counts, as the tokenizer has it.
            kind: Decides what stands before and behind each text, and its length; None: nothing.
            cut: Called with whether each of the texts, some at a time, is too long.

        Returns:
            At most `max_length` ids for each text, of queries `query_length`; of a longer one the
            tokenizer's `truncation_side` is cut.

        Raises:
            UserError: A text has a token that the model has no row for.
        """
        if not texts:
            return []
        prompt = self.prompt(kind) if kind else ""
        shorter = self.query_length if kind == "query" else 0
        suffix = {"query": self.query_suffix, "document": self.document_suffix}.get(kind, ())
        rows: list[list[int]] = []
        for first in range(0, len(texts), TOKENIZED):
            encoded = self.tokenizer(
                [prompt + text for text in texts[first : first + TOKENIZED]],
                truncation=True,
                max_length=min(self.max_length, shorter or self.max_length) - len(suffix),
                return_attention_mask=False,
                return_token_type_ids=False,
            )
            if cut is not None:
                lost = encoded.get("num_truncated_tokens")  # Tokenizers of our own say so.
                if lost is None:
                    lost = [len(row.overflowing) for row in encoded.encodings]
                cut([*map(bool, lost)])
            rows += encoded["input_ids"]
        check_ids(self.tokenizer, rows, self.module.config.vocab_size)
        return [[*ids, *suffix] for ids in rows] if suffix else rows

    def embed(
        self,
        params: Mapping[str, Any],
        input_ids: jax.Array,
        attention_mask: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Computes the vectors of a batch.

        Args:
            params: The module's parameters, those of the dense layer where there is one, and an
                adapter where `with_adapter` has put one beside them.
            input_ids: [batch, length] int32.
            attention_mask: [batch, length], 1 for real tokens; padding may be on either side.
            dropout_key: Turns dropout on, as in training.

        Returns:
            [batch, width] float32, of length one where `normalize` is set.
        """
        inputs = self.module.inputs(input_ids, attention_mask)
        hidden = self.states(params, *inputs, dropout_key=dropout_key)
        vectors = pool(hidden, attention_mask, self.pooling)
        for number, activation in enumerate(self.dense):
            vectors = dense(vectors, params[dense_name(number)], activation)
        return l2_normalize(vectors) if self.normalize else vectors

    def states(
        self, params: Mapping[str, Any], *inputs: Any, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """What the module makes of `inputs` of its own; the other arguments are as of `embed`."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        params, adapter = split_adapter(params)
        variables = {"params": params}
        if adapter is not None:
            variables[COLLECTION] = adapter
        return self.module.apply(variables, *inputs, deterministic=dropout_key is None, rngs=rngs)

    def logits(self, params: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
        """A decoder's logits [..., vocab_size] float32 of such states [..., width]."""
        variables = {"params": split_adapter(params)[0]}
        return self.module.apply(variables, hidden, method="logits")
