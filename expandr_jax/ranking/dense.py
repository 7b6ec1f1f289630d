"""Queries as vectors, and their search in the index of a corpus."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from expandr_jax import metrics
from expandr_jax.ranking.fusion import expanded_query
from expandr_jax.search import Index

# One program for each shape: uncompiled, each of its dozen operations would be a program.
fuse = jax.jit(expanded_query, static_argnames="normalize")


@dataclasses.dataclass(frozen=True)
class EncodedQueries:
    """Vectors of the queries of one split, under one retriever.

    Attributes:
        ids: Query ids.
        queries: [queries, dim].
        expansions: [queries, samples, dim], or None.
        present: [queries, samples] bool, False for an empty generation, or None.
    """

    ids: Sequence[str]
    queries: np.ndarray
    expansions: np.ndarray | None = None
    present: np.ndarray | None = None


def search_vectors(
    index: Index,
    document_ids: Sequence[str],
    query_ids: Sequence[str],
    vectors: np.ndarray,
    depth: int,
    drop_identical_ids: bool,
) -> dict[str, dict[str, float]]:
    """Searches an index for queries.

    Args:
        index: Over the corpus, under the retriever that encoded the queries.
        document_ids: In the order of the index.
        query_ids: In the order of the vectors.
        vectors: [queries, dim].
        depth: Documents a query.
        drop_identical_ids: Leave out a document whose id is the query's (ArguAna).

    Returns:
        Query id -> document id -> score.
    """
    scores, rows = index.search(vectors, depth + drop_identical_ids)
    run = metrics.make_run(query_ids, document_ids, scores, rows)
    return finish_run(run, depth, drop_identical_ids)


def finish_run(
    run: Mapping[str, Mapping[str, float]], depth: int, drop_identical_ids: bool
) -> dict[str, dict[str, float]]:
    """Cuts each query's documents to `depth`, after its own id is left out if so asked."""
    result = {}
    for query, scores in run.items():
        kept = [pair for pair in scores.items() if not (drop_identical_ids and pair[0] == query)]
        result[query] = dict(kept[:depth])
    return result
