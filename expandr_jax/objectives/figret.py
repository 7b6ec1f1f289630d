"""FiGRet: what a generator writes for queries that a retriever fails, as triples to learn in turn.

For such a query it writes an easier passage that answers, one that answers half, and one that
answers among noise. Each aim sets the easier passage against something worse: relevance against
wrong documents, completeness against half of an answer, purity against a diluted one. The query's
own documents, on which the retriever failed, are the last of its triples. How easy each is, the
retriever itself says: by how much it already tells the two apart.

References:
    FiGRet, arXiv 2411.03957, from its description; prompts and margins are of our own.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from expandr_jax.data.triples import Triple

PASSAGE_PROMPTS = ("figret-easier", "figret-half", "figret-noise")  # Names in `PROMPTS`.


def failed_queries(found: np.ndarray, relevant: Sequence[Collection[int]], rank: int) -> list[int]:
    """The queries none of whose relevant documents is among the first so many that were found.

    Args:
        found: [queries, depth] documents, best first, as `Index.search` returns them.
        relevant: The relevant documents of each query.
        rank: How many of the first count.
    """
    first = np.asarray(found)[:, :rank].tolist()
    return [i for i, of in enumerate(relevant) if set(of).isdisjoint(first[i])]


def easier_triples(own: Triple, written: Sequence[str]) -> dict[str, Triple]:
    """A query's triples by their aims.

    Args:
        own: The query with its relevant documents, and wrong ones as negatives, if it has any.
        written: The text of each of `PASSAGE_PROMPTS`; "" where the generator wrote nothing. A
            triple that needs such a text, or would have the same one twice, is left out.
    """
    easier, *worse = written
    found = {}
    if easier and own.negatives:
        found["relevance"] = Triple(own.query, (easier,), own.negatives)
    for aim, text in zip(("completeness", "purity"), worse, strict=True):
        if easier and text and text != easier:
            found[aim] = Triple(own.query, (easier,), (text,))
    return found | ({"judged": own} if own.negatives else {})


def with_margin(
    triple: Triple, queries: Mapping[str, np.ndarray], passages: Mapping[str, np.ndarray]
) -> Triple:
    """The triple with the margin that a retriever's vectors of its texts, [dim] each, give it."""
    scores = (float(queries[triple.query] @ passages[text]) for text in triple.passages)
    scored = dataclasses.replace(triple, teacher_scores=tuple(scores))
    return dataclasses.replace(triple, margin=scored.ease)
