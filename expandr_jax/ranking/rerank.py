"""Re-rankers: they read a query and each of the first documents of its ranking together."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.metrics import RunScores, rank_documents

Scorer = Callable[[str, Sequence[str]], np.ndarray]  # (query, documents) to scores [documents].


@dataclasses.dataclass(frozen=True)
class Reranker:
    """How a re-ranker is made of the config's section `evaluation.rerank`.

    Attributes:
        check: Refuses, by a UserError, settings that cannot work, before anything is ranked.
        load: Loads it.
    """

    check: Callable[[Any], None]
    load: Callable[[Any], Scorer]


RERANKERS: dict[str, Reranker] = {}


def rank_again(
    run: RunScores, queries: Mapping[str, str], corpus: Mapping[str, str], score: Scorer, depth: int
) -> dict[str, dict[str, float]]:
    """Orders the first documents of each query by a re-ranker; the others follow as they were.

    Args:
        run: What was found.
        queries: Query id -> text.
        corpus: Document id -> text.
        score: The re-ranker.
        depth: Documents of a query that it reads.

    Returns:
        Query id -> document id -> score: the re-ranker's, and below its lowest for those that it
        did not read, each 1 less than the one before.
    """
    again = {}
    for query, found in run.items():
        documents = [document for document, _ in rank_documents(found)]
        first, rest = documents[:depth], documents[depth:]
        scores = score(queries[query], [corpus[document] for document in first]).tolist()
        low = min(scores, default=0.0)
        again[query] = dict(zip(first, scores, strict=True)) | {
            document: low - n for n, document in enumerate(rest, start=1)
        }
    return again
