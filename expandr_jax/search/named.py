"""Searches whose queries and documents have names."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics


def search_named(
    search: Callable[[Any, int], tuple[np.ndarray, np.ndarray]],
    query_ids: Sequence[str],
    queries: Any,
    document_ids: Sequence[str],
    depth: int,
    *,
    drop_identical_ids: bool,
    above: float = -np.inf,
) -> dict[str, dict[str, float]]:
    """The best documents of each query by an index.

    Args:
        search: The index's `search`.
        query_ids: In the order of the queries.
        queries: What it searches for, vectors [queries, dim] or texts.
        document_ids: In the order of the index.
        depth: Documents a query.
        drop_identical_ids: Leave out a document whose id is the query's (ArguAna).
        above: Results that score this or less are left out (0 for BM25: no word in common).

    Returns:
        Query id -> document id -> score, best first.
    """
    scores, rows = search(queries, depth + drop_identical_ids)
    run = metrics.make_run(query_ids, document_ids, scores, rows, above)
    for query, found in run.items():
        if drop_identical_ids:
            found.pop(query, None)
        run[query] = dict(list(found.items())[:depth])
    return run
