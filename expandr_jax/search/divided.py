"""Search by all processes of a run, each over its part of the vectors or for its share of queries.

Process 0 asks, while the others wait for it: see `Processes.call`. Queries and what is found go
through files that all of them see. What is found does not depend on how many processes there are.
Exact search's parts are whole blocks, so that a product of vectors has the same shape and the same
place in it whoever computes it: that is what one index finds, to the last bit. ScaNN's are of
SHARD_ROWS vectors, each with an index of its own. BM25's index is one, whose files each process
maps; its queries are shared.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.arrays import read_arrays, write_arrays
from expandr_jax.runtime.processes import Processes
from expandr_jax.search.bm25 import Bm25Index
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
    """Spans of SHARD_ROWS rows, from `index` on each `count`-th of them."""
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
        self._closing = f"release {name}"
        _serve(processes, self._name, self._answer, shares)
        processes.serve(self._closing, lambda _: self._close())

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
        """Lets go of all processes' parts; they are opened again when something is searched.

        All call it, of which those that run ahead may answer searches afterwards: they let go of
        what these open when process 0, which has asked them, comes here.
        """
        self._close()
        if self._processes.is_main:
            self._processes.tell(self._closing, None)

    def _close(self) -> None:
        self.__dict__.pop("_parts", None)

    @functools.cached_property
    def _parts(self) -> list[tuple[int, Index]]:
        return [(start, self._part(start, end)) for start, end in self.spans]

    def _own(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best results of this process's parts."""
        found = ((start, *part.search(queries, k)) for start, part in self._parts)
        return merge_found([(scores, rows + np.int32(start)) for start, scores, rows in found], k)

    def _together(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        if self._processes.count == 1:
            return self._own(queries, k)
        self._shares.mkdir(parents=True, exist_ok=True)
        asked = self._shares / "queries.npz"
        write_arrays(asked, queries=queries)
        parts = _ask(self._processes, self._name, asked, k)
        return merge_found(parts, k)

    def _answer(self, asked: list) -> str | None:
        """Searches this process's parts for queries in a file; the name of that of the results."""
        name, k = asked
        if not self.spans:
            return None
        found = self._own(read_arrays(self._shares / name)["queries"], k)
        return _answered(self._processes, self._shares, found)


class DividedWords:
    """BM25's index, whose queries several processes share; process 0 alone searches it.

    All processes make this; each opens the index when it first has something to search for.

    Args:
        name: What they know it by.
        open_index: Opens it; process 0 does before the others, and makes what is not there.
        processes: Those that search.
        shares: A directory where they hand each other files.
    """

    def __init__(
        self,
        name: str,
        open_index: Callable[[], Bm25Index],
        processes: Processes,
        shares: pathlib.Path,
    ):
        self._open, self._processes, self._shares = open_index, processes, shares
        self._name, self._closing = f"search bm25 {name}", f"release bm25 {name}"
        if processes.count > 1:
            _serve(processes, self._name, self._answer, shares)
            processes.serve(self._closing, lambda _: self._close())

    def __call__(self) -> Bm25Index:
        """The index, as process 0 searches it."""
        return self._asked

    def release(self) -> None:
        """Lets go of it in all processes; it is opened again when something is searched.

        All call it, and do so when process 0 is here: until then it may have others search.
        """
        if self._processes.count == 1:
            self._close()
        elif self._processes.is_main:
            self._processes.tell(self._closing, None)

    def _close(self) -> None:
        for name in ("_asked", "_own"):
            self.__dict__.pop(name, None)

    @functools.cached_property
    def _own(self) -> Bm25Index:
        return self._open()

    @functools.cached_property
    def _asked(self) -> Bm25Index:
        return self._own if self._processes.count == 1 else _Words(self._own, self._together)

    def _answer(self, asked: list) -> str | None:
        """Searches for this process's share of the texts in a file, as `DividedIndex` does."""
        where, k = asked
        processes, shares = self._processes, self._shares
        queries = json.loads(read_arrays(shares / where)["queries"].tobytes())
        start, end = (len(queries) * (processes.index + i) // processes.count for i in (0, 1))
        if start == end:
            return None
        return _answered(processes, shares, self._own.search(queries[start:end], k))

    def _together(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        self._shares.mkdir(parents=True, exist_ok=True)
        asked = self._shares / "queries.npz"
        found = [(np.empty((0, k), np.float32), np.empty((0, k), np.int32))]
        for first in range(0, len(queries), _QUERIES):
            texts = json.dumps([*queries[first : first + _QUERIES]]).encode()
            write_arrays(asked, queries=np.frombuffer(texts, np.uint8))
            found += _ask(self._processes, self._name, asked, k)
        scores, rows = (np.concatenate(part) for part in zip(*found, strict=True))
        return scores, rows


class _Words(Bm25Index):
    """An index whose searches are another function's."""

    def __init__(
        self,
        index: Bm25Index,
        search: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]],
    ):
        vars(self).update(vars(index))
        self._search = search


def found_by_all(
    search: Callable[[], tuple[np.ndarray, np.ndarray]],
    processes: Processes,
    shares: pathlib.Path,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows that process 0 alone searches for, in each process; all call it together."""
    if processes.count == 1:
        return search()
    path = shares / "results.npz"

    def searched() -> None:
        shares.mkdir(parents=True, exist_ok=True)
        _save(path, search())

    processes.once(searched)
    found = _load(path)
    processes.barrier()  # Nobody writes the next ones before all have read these.
    if processes.is_main:
        path.unlink()
    return found


def _serve(
    processes: Processes,
    name: str,
    answer: Callable[[list], str | None],
    shares: pathlib.Path | None,
) -> None:
    """Has this process answer what `_ask` asks, and remove its file when that has been read.

    It does so itself: of a workdir in a bucket each has its own directory.
    """
    processes.serve(name, answer)
    processes.serve(_read(name), lambda _: _found(processes, shares).unlink(missing_ok=True))


def _ask(
    processes: Processes, name: str, asked: pathlib.Path, k: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each process finds for the queries of a file, by its number; the file is removed."""
    answers = processes.call(name, [asked.name, k])
    parts = [_load(asked.with_name(answer)) for answer in answers if answer]
    with contextlib.suppress(OSError):
        asked.unlink()
    processes.tell(_read(name), None)
    return parts


def _read(name: str) -> str:
    """What processes are told by when the answers to a search have been read."""
    return f"{name}, read"


def _found(processes: Processes, shares: pathlib.Path) -> pathlib.Path:
    """The file of what a process has found."""
    return shares / f"found.process-{processes.index}.npz"


def _answered(
    processes: Processes, shares: pathlib.Path, found: tuple[np.ndarray, np.ndarray]
) -> str:
    """The name of the file that hands process 0 what this one has found."""
    path = _found(processes, shares)
    _save(path, found)
    return path.name


def _save(path: pathlib.Path, found: tuple[np.ndarray, np.ndarray]) -> None:
    write_arrays(path, scores=found[0], rows=found[1])


def _load(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    found = read_arrays(path)
    return found["scores"], found["rows"]
