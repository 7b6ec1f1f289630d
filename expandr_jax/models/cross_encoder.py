"""A cross-encoder: an encoder reads a query and a document together, a head gives their score.

The head is that of transformers' sequence classification with one label. Of BERT it is a dense
layer with tanh on the first token, which BERT calls its pooler and RoBERTa a part of its
classifier, and a linear one; of ModernBERT a dense layer, a norm and a linear one, on the first
token or the mean.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.data.batches import bucket_length, encoding_lengths, pad
from expandr_jax.errors import NotFiniteError
from expandr_jax.files.records import hash_json
from expandr_jax.models.bert import Bert, BertConfig
from expandr_jax.models.encoder import ACTIVATIONS, Encoder, HeadLayer, LayerNorm
from expandr_jax.models.identity import module_identity, tokenizer_identity
from expandr_jax.models.modernbert import ModernBert, ModernBertConfig
from expandr_jax.models.pooling import pool
from expandr_jax.models.token_ids import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Cut = Callable[[Sequence[bool]], None]
SCORE_ACTIVATIONS = {"identity": lambda x: x, "sigmoid": jax.nn.sigmoid}


class PairClassifier(Encoder):
    """Token ids of pairs to one logit each, [batch] float32.

    It is called as `Bert` is; `token_types` are 1 in the document of BERT's pairs.
    """

    config: BertConfig

    @property
    def head(self) -> list[Any]:
        """The head's options, for identity hashes: it has none."""
        return []

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        encoder = Bert(self.config, self.dtype, self.remat, name="encoder")
        hidden = encoder(input_ids, attention_mask, token_types, deterministic=deterministic)
        first = pool(hidden, attention_mask, "cls")
        first = jnp.tanh(HeadLayer(self.config.hidden_size, name="pooler")(first))
        first = nn.Dropout(self.config.hidden_dropout)(first, deterministic=deterministic)
        return HeadLayer(1, axis="norm", name="classifier")(first)[:, 0]


class ModernPairClassifier(Encoder):
    """ModernBERT as a classifier of pairs, which have no token types; as `PairClassifier`.

    Attributes:
        pooling: "cls" or "mean".
        activation: A key of `encoder.ACTIVATIONS`.
        use_bias: The head's first layer has one.
        dropout: Rate before its last.
    """

    config: ModernBertConfig
    pooling: str = "cls"
    activation: str = "gelu"
    use_bias: bool = False
    dropout: float = 0.0

    @property
    def head(self) -> list[Any]:
        """The head's options, for identity hashes."""
        return [self.pooling, self.activation, self.use_bias]

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_types: jax.Array | None = None,
        *,
        deterministic: bool = True,
    ) -> jax.Array:
        cfg = self.config
        encoder = ModernBert(cfg, self.dtype, self.remat, name="encoder")
        hidden = encoder(input_ids, attention_mask, deterministic=deterministic)
        x = pool(hidden, attention_mask, self.pooling)
        x = HeadLayer(cfg.hidden_size, self.use_bias, name="pooler")(x)
        x = LayerNorm(cfg.norm_eps, cfg.norm_bias, name="head_norm")(
            ACTIVATIONS[self.activation](x)
        )
        x = nn.Dropout(self.dropout)(x, deterministic=deterministic)
        return HeadLayer(1, axis="norm", name="classifier")(x)[:, 0]


@dataclasses.dataclass(frozen=True)
class CrossEncoder:
    """Maps pairs of a query and a document to scores; parameters are passed in, never kept.

    Attributes:
        module: The encoder with its head.
        tokenizer: Text to ids.
        max_length: Most tokens of a pair, special ones included.
        activation: A key of `SCORE_ACTIVATIONS`, applied to the logits.
        files: The `ModelFiles` that it is from: an export keeps what its config.json says.
    """

    module: PairClassifier | ModernPairClassifier
    tokenizer: PreTrainedTokenizerFast
    max_length: int
    activation: str
    files: Any = None

    @functools.cached_property
    def identity(self) -> str:
        """sha256 over all that scores depend on, but for the parameters and the texts."""
        module, ends = self.module, (self.max_length, self.activation)
        parts = module_identity(module), tokenizer_identity(self.tokenizer), ends, *module.head
        return hash_json([*parts])

    def token_ids(
        self, query: str, documents: Sequence[str], cut: Cut | None = None
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids and types of a query with each of its documents.

        Where both are too long together the longer one loses its end, at last both, as in
        sentence-transformers; `cut` is called with whether each pair is.
        """
        encoded = self.tokenizer(
            [query] * len(documents),
            list(documents),
            return_token_type_ids=True,
            truncation="longest_first",
            max_length=self.max_length,
        )
        check_ids(self.tokenizer, encoded["input_ids"], self.module.config.vocab_size)
        if cut is not None:
            cut([bool(row.overflowing) for row in encoded.encodings])
        types = encoded["token_type_ids"]
        if "token_type_ids" not in self.tokenizer.model_input_names:
            types = [[0] * len(ids) for ids in encoded["input_ids"]]
        return list(zip(encoded["input_ids"], types, strict=True))

    def scores(
        self,
        params: Mapping[str, Any],
        query: str,
        documents: Sequence[str],
        *,
        rows: int = 32,
        cut: Cut | None = None,
    ) -> np.ndarray:
        """Scores of a query with each of some documents: [documents] float32.

        Args:
            params: The module's parameters.
            query: The query.
            documents: Any number of texts.
            rows: Pairs that are computed at once.
            cut: As of `token_ids`.

        Raises:
            NotFiniteError: If a score is not finite, which means damaged weights.
        """
        tokens = self.token_ids(query, documents, cut) if documents else []  # BM25 may find none.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i][0]))
        result = np.zeros(len(tokens), np.float32)
        lengths = encoding_lengths(self.max_length)
        for start in range(0, len(order), rows):
            part = order[start : start + rows]
            length = bucket_length(len(tokens[part[-1]][0]), lengths)
            # Rows that only fill the shape repeat the first one.
            filled = part + part[:1] * (rows - len(part))
            ids, mask = pad([tokens[i][0] for i in filled], self.tokenizer.pad_token_id, length)
            types, _ = pad([tokens[i][1] for i in filled], 0, length)
            logits = pair_logits(self.module, params, ids, mask, types)
            result[part] = np.asarray(SCORE_ACTIVATIONS[self.activation](logits))[: len(part)]
        if not np.isfinite(result).all():
            raise NotFiniteError(
                f"the score of {query[:60]!r} and a document is not finite; the weights of the "
                "re-ranker are damaged"
            )
        return result


@functools.partial(jax.jit, static_argnums=0)
def pair_logits(module, params, ids, mask, types):
    """A head's logits [rows] of pairs as tokens, [rows, length] each."""
    return module.apply({"params": params}, ids, mask, types)


def say_cut(say: Callable[[str], None], name: str, cut: Counter[bool]) -> None:
    """Says how many pairs were cut, if some were.

    Args:
        say: Tells the user.
        name: Whose pairs they are.
        cut: Whether each was, counted; empty afterwards.
    """
    if cut[True]:
        say(
            f"{name}: {cut[True]} of {cut.total()} pairs of a query and a document "
            f"({100 * cut[True] / cut.total():.1f} %) are longer than is read, and lost the rest"
        )
    cut.clear()
