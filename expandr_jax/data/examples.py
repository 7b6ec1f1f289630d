"""Triples of text to the token ids that step A trains on."""

from collections.abc import Iterable, Sequence

import numpy as np

from expandr_jax.data.triples import Triple
from expandr_jax.objectives.contrastive import ContrastiveExample, Passage
from expandr_jax.vectors.encoder import Kind, TextEncoder

TEXTS_AT_ONCE = 4096  # Tokenized in one call.


def triple_examples(triples: Sequence[Triple], encoder: TextEncoder) -> list[ContrastiveExample]:
    """Tokenizes triples; a query's right passages on other lines are known to be right, too."""
    queries = _tokens(encoder, (t.query for t in triples), "query")
    documents = _tokens(
        encoder, (x for t in triples for x in (*t.positives, *t.negatives, *t.expansions)),
        "document",
    )  # fmt: skip
    known: dict[str, set[str]] = {}
    for triple in triples:
        known.setdefault(triple.query, set()).update(triple.positives)
    examples = []
    for triple in triples:
        texts = (*triple.positives, *triple.negatives)
        scores = triple.teacher_scores or [None] * len(texts)
        passages = [Passage(documents[x], x, score) for x, score in zip(texts, scores, strict=True)]
        first, *others = passages[: len(triple.positives)]
        examples.append(
            ContrastiveExample(
                query=queries[triple.query],
                expansions=[documents[x] for x in triple.expansions],
                positive=first.ids,
                positive_text=first.text,
                negatives=passages[len(triple.positives) :],
                other_positives=others,
                known=known[triple.query],
                positive_score=first.score,
            )
        )
    return examples


def _tokens(encoder: TextEncoder, texts: Iterable[str], kind: Kind) -> dict[str, np.ndarray]:
    """Text -> token ids; equal texts are kept once, as arrays, which are a fifth of a list."""
    unique = list(dict.fromkeys(texts))
    result = {}
    for start in range(0, len(unique), TEXTS_AT_ONCE):
        block = unique[start : start + TEXTS_AT_ONCE]
        for text, ids in zip(block, encoder.tokenize(block, kind), strict=True):
            result[text] = np.array(ids, np.int32)
    return result
