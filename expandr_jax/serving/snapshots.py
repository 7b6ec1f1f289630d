"""What live documents stand on: the documents and vectors of a run, or a later state of them.

A state has one file, current.json, that says which snapshot counts and from which segment of the
log writes come on top of it. It is replaced when a snapshot is whole on disk, never before.

    current.json             {"of": KEY, "snapshot": N or 0, "segment": N, "writes": COUNT}
    snapshot-N/              documents as data/documents.py keeps them, and vectors.npy
    log/segment-N.log        see log.py
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from expandr_jax.data.documents import Documents, ids_of, rows_of, texts_of, write_documents
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.files.scratch import reserve
from expandr_jax.search import Index
from expandr_jax.serving.flat import Results, search_flat, search_rows
from expandr_jax.serving.log import sync_directory
from expandr_jax.vectors.stored import StoredVectors, from_storage, open_vectors

_CURRENT = "current.json"
_VECTORS = "vectors.npy"
_ROWS = 8192  # Vectors that are copied at once.

BaseVectors = np.ndarray | StoredVectors


@dataclasses.dataclass(frozen=True)
class Base:
    """Documents in an order, each with its vector, which never change.

    Attributes:
        ids, texts: By row.
        rows: Document id -> row.
        vectors: By row, as they are stored.
        index: An approximate index of them; None: they are searched exactly.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    rows: Mapping[str, int]
    vectors: BaseVectors
    index: Index | None = None

    @classmethod
    def of(
        cls, corpus: Mapping[str, str], vectors: BaseVectors, index: Index | None = None
    ) -> "Base":
        """Documents, id -> text, and their vectors in the same order."""
        return cls(ids_of(corpus), texts_of(corpus), rows_of(corpus), vectors, index)

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, queries: np.ndarray, k: int, dead: np.ndarray) -> list[Results]:
        """The best rows of each query [Q, D] that are not dead."""
        if self.index is None:
            return search_flat(self.vectors, queries, k, dead)
        gone = int(dead.sum())
        fetch = min(len(self), k + min(gone, k))
        while True:
            found = [
                (scores[~dead[rows]][:k], rows[~dead[rows]][:k])
                for scores, rows in zip(*self.index.search(queries, fetch), strict=True)
            ]
            if fetch == len(self) or all(len(rows) == k for _, rows in found):
                return found
            fetch = min(len(self), 4 * fetch)

    def search_among(self, rows: np.ndarray, query: np.ndarray, k: int) -> Results:
        """The best of some rows, in rising order."""
        return search_rows(self.vectors, rows, query, k)


@dataclasses.dataclass(frozen=True)
class Current:
    """The current snapshot, and where the log goes on from it.

    Attributes:
        snapshot: The one that counts; 0 is the run itself.
        segment: The first of the log that is not in it.
        writes: How many are in it.
    """

    snapshot: int = 0
    segment: int = 1
    writes: int = 0


def read_current(state: pathlib.Path, key: str) -> Current:
    """Where a state stands; one that is new begins here.

    Args:
        state: Its directory.
        key: A hash of the run that it is of.

    Raises:
        UserError: It is of another run, or damaged.
    """
    path = state / _CURRENT
    if not path.exists():
        if any(state.glob("snapshot-*")) or any(state.glob("log/segment-*")):
            raise UserError(f"{path}: is missing; restore it or use another --state")
        write_current(state, key, Current())
    try:
        record = json.loads(path.read_bytes())
        of = record.pop("of")
        current = Current(**{name: int(value) for name, value in record.items()})
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: is damaged; restore it or use another --state") from None
    if of != key:
        raise UserError(
            f"{path}: its documents are of another run, or of this one before it was trained "
            "again; use another --state"
        )
    return current


def write_current(state: pathlib.Path, key: str, current: Current) -> None:
    """Makes a snapshot the current one."""
    write_json(state / _CURRENT, {"of": key, **dataclasses.asdict(current)})
    sync_directory(state)


def remove_others(state: pathlib.Path, snapshot: int) -> None:
    """Removes all snapshots but one, which counts, and what is left of those never finished."""
    for path in state.glob("*snapshot-*"):
        if path.name != f"snapshot-{snapshot}":
            shutil.rmtree(path, ignore_errors=True)


def write_snapshot(
    state: pathlib.Path,
    number: int,
    rows: Callable[[], Iterator[tuple[str, str]]],
    vectors: Callable[[], Iterator[np.ndarray]],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> None:
    """Writes a snapshot, which is there whole or not at all.

    Args:
        state: The directory of the state.
        number: The snapshot's.
        rows: Ids and texts, in order; one at least.
        vectors: Blocks of the file's rows, in the same order.
        shape, dtype: What the vectors' file has.
    """
    directory, part = state / f"snapshot-{number}", state / f".snapshot-{number}"
    shutil.rmtree(part, ignore_errors=True)
    write_documents(rows(), part)
    file = np.lib.format.open_memmap(part / _VECTORS, "w+", dtype, shape)
    with open(part / _VECTORS, "r+b") as begun:
        reserve(begun, begun.seek(0, os.SEEK_END))
    start = 0
    for block in vectors():
        file[start : start + len(block)] = block
        start += len(block)
    file.flush()
    for path in part.iterdir():
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    sync_directory(part)
    shutil.rmtree(directory, ignore_errors=True)
    os.rename(part, directory)
    sync_directory(state)


def open_snapshot(state: pathlib.Path, number: int) -> tuple[Documents, BaseVectors]:
    """The documents of a snapshot and their vectors.

    Raises:
        UserError: A file of it is missing or damaged.
    """
    directory = state / f"snapshot-{number}"
    try:
        documents = Documents(directory)
        vectors = open_vectors(directory / _VECTORS)
    except (OSError, ValueError, LookupError):
        documents = vectors = None
    if documents is None or len(documents) != len(vectors):
        raise UserError(f"{directory}: is damaged; restore it or use another --state")
    return documents, vectors


def stored_rows(vectors: BaseVectors, alive: np.ndarray) -> Iterator[np.ndarray]:
    """Rows of vectors that are alive, as they are in their file, a block at a time."""
    stored = vectors.records if isinstance(vectors, StoredVectors) else vectors
    for start in range(0, len(stored), _ROWS):
        yield stored[start : start + _ROWS][alive[start : start + _ROWS]]


def decoded(stored: np.ndarray) -> np.ndarray:
    """Rows of a file as vectors [count, dim] float32."""
    return np.asarray(from_storage(stored), np.float32)
