"""Search by all processes of a run, each over its parts of the corpus's vectors.

Process 0 asks, while the others wait for it: see `Processes.call`. Queries and what is found go
through files that all of them see. What is found does not depend on how many processes there are.
Exact search's parts are whole blocks, so that a product of vectors has the same shape and the same
place in it whoever computes it: that is what one index finds, to the last bit. ScaNN's are of
SHARD_ROWS vectors, each with an index of its own.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.runtime.processes import Processes
from expandr_jax.search.exact import merge_found
from expandr_jax.search.index import Index
from expandr_jax.search.vectors import check_queries

SHARD_ROWS = 1 << 20  # Vectors of one index of ScaNN: what one host builds in minutes.
_QUERIES = 1 << 16  # Searched for at once: their vectors and what is found go to files.

Span = tuple[int, int]  # Rows of the corpus: from, to.


def share_of_blocks(size: int, block_rows: int, index: int, count: int) -> list[Span]:
    """The whole blocks of one of several processes, as one span; none where there are too few."""
    blocks = -(-size // block_rows)
    start, end = (blocks * i // count * block_rows for i in (index, index + 1))
    return [(start, min(end, size))] if start < end else []


def share_of_shards(size: int, index: int, count: int) -> list[Span]:
    """Every so many-th span of SHARD_ROWS."""
    return [(i, min(i + SHARD_ROWS, size)) for i in range(0, size, SHARD_ROWS)][index::count]


class DividedIndex:
    """Several indexes of parts of a corpus, which processes share; `search` is as `Index.search`.

    Args:
        name: What the processes know it by; all of them make this index.
        size, dimension: How many vectors the corpus has, and how wide they are.
        spans: The parts of this process.
        part: Opens or makes the index of a span; called when something is searched.
        query_rows: Queries of a batch of exact search.
        processes: Those that search.
        shares: A directory where they hand each other files; None: there is one process.
    """

    def __init__(
        self,
        name: str,
        size: int,
        dimension: int,
        spans: Sequence[Span],
        part: Callable[[int, int], Index],
        query_rows: int,
        processes: Processes,
        shares: pathlib.Path | None = None,
    ):
        self.size, self.dimension, self.spans = size, dimension, spans
        self._name, self._part, self._processes = f"search {name}", part, processes
        self._query_rows, self._shares = query_rows, shares
        processes.serve(self._name, self._answer)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores [Q, min(k, size)] float32 and rows int32, best first; process 0 alone asks."""
        if k < 1:
            raise UserError(f"k is {k}; a search returns at least 1 result a query")
        k = min(k, self.size)
        queries = check_queries(queries, self.dimension)
        found = [(np.empty((0, k), np.float32), np.empty((0, k), np.int32))]
        for start in range(0, len(queries), _QUERIES):
            some = queries[start : start + _QUERIES]
            # The last few of many are in a batch of the same shape as the others.
            lacking = self._query_rows - len(some) if start else 0
            some = np.pad(some, ((0, max(0, lacking)), (0, 0)))
            found.append(self._together(some, k))
        scores, rows = (np.concatenate(part)[: len(queries)] for part in zip(*found, strict=True))
        return scores, rows

    def release(self) -> None:
        """Lets go of this process's parts; they are opened again when something is searched."""
        self.__dict__.pop("_parts", None)

    @functools.cached_property
    def _parts(self) -> list[tuple[int, Index]]:
        return [(start, self._part(start, end)) for start, end in self.spans]

    def _own(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """What this process's parts have."""
        found = ((start, *part.search(queries, k)) for start, part in self._parts)
        return merge_found([(scores, rows + np.int32(start)) for start, scores, rows in found], k)

    def _together(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._processes.count == 1:
            return self._own(queries, k)
        self._shares.mkdir(parents=True, exist_ok=True)
        asked = self._shares / "queries.npy"
        np.save(asked, queries)
        paths = [self._shares / n for n in self._processes.call(self._name, [asked.name, k]) if n]
        parts = []
        for path in paths:
            with np.load(path, allow_pickle=False) as file:
                parts.append((file["scores"], file["rows"]))
        for path in (asked, *paths):
            with contextlib.suppress(OSError):
                path.unlink()
        return merge_found(parts, k)

    def _answer(self, asked: list) -> str | None:
        """Searches this process's parts for queries in a file; the name of that of the results."""
        name, k = asked
        if not self.spans:
            return None
        scores, rows = self._own(np.load(self._shares / name, allow_pickle=False), k)
        found = f"found.process-{self._processes.index}.npz"
        np.savez(self._shares / found, scores=scores, rows=rows)
        return found
