"""Exact search for a few queries at once: products in numpy, which starts within microseconds.

`search.exact` serves thousands of queries a pass on the devices; a single one would wait for the
corpus to be laid out there each time.
"""

from collections.abc import Sequence

import numpy as np

from expandr_jax.search.vectors import check_queries
from expandr_jax.vectors.stored import StoredVectors

ROWS_AT_ONCE = 1 << 16  # Rows whose scores are in memory at once.

Results = tuple[np.ndarray, np.ndarray]  # Scores float32 and rows, the best first.


def search_flat(
    vectors: np.ndarray | StoredVectors, queries: np.ndarray, k: int, dead: np.ndarray | None = None
) -> list[Results]:
    """The best rows of each query by inner product; equal scores come in the order of the rows.

    Args:
        vectors: [N, D], may be memory-mapped.
        queries: [Q, D], finite.
        k: Rows of a query, at most; fewer where fewer are alive.
        dead: [N] bool, rows that are left out.
    """
    queries = check_queries(queries, vectors.shape[1])
    parts: list[list[Results]] = [[] for _ in queries]
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        block = np.asarray(vectors[start : start + ROWS_AT_ONCE], np.float32)
        scores = queries @ block.T
        if dead is not None:
            scores[:, dead[start : start + ROWS_AT_ONCE]] = -np.inf
        for found, row in zip(parts, scores, strict=True):
            best = _best(row, k)
            found.append((row[best], best + start))
    return [merge(found, k) for found in parts]


def search_rows(
    vectors: np.ndarray | StoredVectors, rows: np.ndarray, query: np.ndarray, k: int
) -> Results:
    """The best among some rows, in rising order, for a query [D]."""
    scores = np.asarray(vectors[rows], np.float32) @ query
    best = _best(scores, k)
    return scores[best], rows[best]


def merge(parts: Sequence[Results], k: int) -> Results:
    """The best k of several parts, whose rows rise from part to part."""
    if not parts:
        return np.zeros(0, np.float32), np.zeros(0, np.int64)
    if len(parts) == 1:
        return parts[0]
    scores, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((rows, -scores))[:k]
    return scores[order], rows[order]


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """The indices of the k best scores, best first, without those of -inf."""
    if k < len(scores):
        # All that tie with the last one, of which the first rows are taken.
        places = np.flatnonzero(scores >= np.partition(scores, -k)[-k])
    else:
        places = np.arange(len(scores))
    chosen = scores[places]
    order = np.lexsort((places, -chosen))[:k]
    return places[order][chosen[order] > -np.inf]
