"""Documents that come and go while they are searched.

What a run has encoded is the base. On top of it lie the writes since: a log on disk, and in memory
their vectors, searched exactly, and marks of those in the base that are gone. A merge makes a new
base of both in the background. A search sees one state of all this, as of the moment it began.
"""

import dataclasses
import json
import logging
import pathlib
import struct
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.search import Index
from expandr_jax.serving.flat import Results, merge, search_flat, search_rows
from expandr_jax.serving.log import Log
from expandr_jax.serving.snapshots import (
    Base,
    BaseVectors,
    Current,
    decoded,
    open_snapshot,
    read_current,
    remove_others,
    stored_rows,
    write_current,
    write_snapshot,
)
from expandr_jax.vectors.stored import StoredVectors, storage_type, to_storage

MERGE_FROM = 4096  # Writes on top of the base that are merged into it.
_LENGTH = struct.Struct("<I")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Hit:
    """A document that was found."""

    id: str
    score: float
    text: str


@dataclasses.dataclass(frozen=True)
class View:
    """All documents as of one moment.

    Attributes:
        base: The base; `dead` marks its rows that are gone.
        ids, texts, vectors: What came on top, in that order, with rows behind the base's; the
            first `count` of them count, and `gone` marks those that are gone again.
    """

    base: Base
    dead: np.ndarray
    ids: list[str]
    texts: list[str]
    vectors: np.ndarray
    gone: np.ndarray

    @classmethod
    def of(cls, base: Base) -> "View":
        """The view of a base without changes."""
        empty = np.empty((64, base.vectors.shape[1]), np.float32)
        return cls(base, np.zeros(len(base), bool), [], [], empty, np.zeros(0, bool))

    @property
    def count(self) -> int:
        """The number of documents added since the base was made."""
        return len(self.gone)

    def __len__(self) -> int:
        return len(self.base) - int(self.dead.sum()) + self.count - int(self.gone.sum())

    def search(
        self, queries: np.ndarray, k: int, among: Sequence[np.ndarray | None] = ()
    ) -> list[list[Hit]]:
        """The best documents of each query [Q, D], of rows in rising order if `among` has some."""
        return [self.hits(found) for found in self.find(queries, k, among)]

    def at(self, among: np.ndarray | None) -> tuple["View", np.ndarray | None]:
        """This view, and the rows that results are limited to; None: all."""
        return self, among

    def find(
        self, queries: np.ndarray, k: int, among: Sequence[np.ndarray | None] = ()
    ) -> list[Results]:
        """As `search`, in rows."""
        if any(rows is not None for rows in among):
            return [
                self.find(query[None], k)[0] if rows is None else self.best_of(rows, query, k)
                for query, rows in zip(queries, among, strict=True)
            ]
        found = self.base.search(queries, k, self.dead)
        on_top = search_flat(self.vectors[: self.count], queries, k, self.gone)
        first = len(self.base)
        return [
            merge([below, (scores, rows + first)], k)
            for below, (scores, rows) in zip(found, on_top, strict=True)
        ]

    def best_of(self, rows: np.ndarray, query: np.ndarray, k: int) -> Results:
        """The best of some rows, in rising order, for a query [D]."""
        first = len(self.base)
        below, above = rows[rows < first], rows[rows >= first]
        scores, places = search_rows(self.vectors, above - first, query, k)
        parts = [self.base.search_among(below, query, k), (scores, places + first)]
        return merge(parts, k)

    def hits(self, found: Results) -> list[Hit]:
        """What was found, with ids and texts."""
        hits = []
        for score, row in zip(*(part.tolist() for part in found), strict=True):
            at = row - len(self.base)
            part, at = (self, at) if at >= 0 else (self.base, row)
            hits.append(Hit(part.ids[at], score, part.texts[at]))
        return hits

    def alive(self) -> Iterator[tuple[str, str]]:
        """Ids and texts of all documents, in order."""
        for part, dead in ((self.base, self.dead), (self, self.gone)):
            for row in np.flatnonzero(~dead):
                yield part.ids[int(row)], part.texts[int(row)]


class LiveDocuments:
    """The documents of a service, kept in a directory of its own.

    Whoever makes it has the directory for itself (see `state.py`).

    Args:
        state: The directory.
        key: A hash of the run, by which another one's state is refused.
        base: The run's own documents.
        encode: Texts to vectors [count, dim] float32.
        dtype: The type in which the run keeps its vectors.
        index: Makes an approximate index of a snapshot's vectors, which is kept in a directory;
            None: they are searched exactly.
        merge_from: Rows on top of the base, or dead in it, from which on they are merged.
        merged: Called with these documents after each merge.

    Raises:
        UserError: The state is damaged, or of another run.
    """

    def __init__(
        self,
        state: pathlib.Path,
        key: str,
        base: Base,
        encode: Callable[[Sequence[str]], np.ndarray],
        dtype: str = "float32",
        index: Callable[[BaseVectors, pathlib.Path], Index] | None = None,
        merge_from: int = MERGE_FROM,
        merged: Callable[["LiveDocuments"], None] = lambda documents: None,
    ):
        self._state, self._key, self._encode, self._index = state, key, encode, index
        self._width, self._dtype, self._merge_from = base.vectors.shape[1], dtype, merge_from
        self._writing, self._changing = threading.Lock(), threading.Lock()
        self._merging: threading.Thread | None = None
        self._merged = merged
        self._touched: set[str] | None = None  # Ids of writes since a merge began.
        self._current = read_current(state, key)
        remove_others(state, self._current.snapshot)
        if self._current.snapshot:
            base = self._open_base(self._current.snapshot)
        self._writes, self._view = self._current.writes, View.of(base)
        self._where: dict[str, int] = {}  # Id -> row of what is on top.
        self._log = Log(state / "log", self._current.segment)
        for content in self._log:
            self._apply(*self._read(content))

    def __len__(self) -> int:
        return len(self.view)

    @property
    def view(self) -> View:
        """All documents as they are now."""
        return self._view

    @property
    def writes(self) -> int:
        """How many writes there have been, ever."""
        return self._writes

    def put(self, documents: Sequence[tuple[str, str]]) -> int:
        """Adds documents, or replaces those of the same ids; returns how many were replaced.

        On return they are on disk and are found; a kill before leaves none of them.

        Raises:
            UserError: An id stands twice.
            OSError: The disk is full; nothing has changed.
        """
        ids = [name for name, _ in documents]
        if len(set(ids)) < len(ids):
            raise UserError("an id stands twice among the documents; expected each once")
        if not documents:
            return 0
        stored = to_storage(self._encode([text for _, text in documents]), self._dtype)
        with self._writing:
            return self._write(documents, stored, [])

    def remove(self, ids: Sequence[str]) -> int:
        """Removes documents; returns how many of them there were. Else as `put`."""
        nothing = np.empty((0, *self._row[1]), self._row[0])
        with self._writing:
            there = [name for name in dict.fromkeys(ids) if name in self]
            return self._write([], nothing, there) if there else 0

    def __contains__(self, name: str) -> bool:
        with self._changing:
            return self._place(name) is not None

    def get(self, name: str) -> str | None:
        """The text of a document; None: there is none of this id."""
        with self._changing:
            view, place = self._view, self._place(name)
        if place is None:
            return None
        first = len(view.base)
        return view.base.texts[place] if place < first else view.texts[place - first]

    def search(
        self, queries: np.ndarray, k: int, among: Sequence[Sequence[str] | None] = ()
    ) -> list[list[Hit]]:
        """The k best documents of each query [Q, D], fewer where there are fewer.

        Args:
            queries: BaseVectors.
            k: Most documents of a query.
            among: For each query, ids to which its results are limited, or None.
        """
        with self._changing:
            view = self._view
            rows = [None if ids is None else self._places(ids) for ids in among]
        return view.search(queries, k, rows)

    def at(self, among: Sequence[str] | None) -> tuple[View, np.ndarray | None]:
        """The present view, and the rows there of the ids that limit results; None: all."""
        with self._changing:
            return self._view, None if among is None else self._places(among)

    def merge(self) -> None:
        """Merges all documents, one at least, into a new base; searches and writes go on."""
        with self._writing:
            segment, view, writes = self._log.rotate(), self._view, self._writes
            self._touched = set()
        number = self._current.snapshot + 1
        stored = _stored(view.base.vectors)
        kinds = (~view.dead).sum() + (~view.gone).sum()

        def blocks() -> Iterator[np.ndarray]:
            yield from stored_rows(view.base.vectors, ~view.dead)
            yield to_storage(view.vectors[: view.count][~view.gone], self._dtype)

        shape = (int(kinds), *stored.shape[1:])
        write_snapshot(self._state, number, view.alive, blocks, shape, stored.dtype)
        base = self._open_base(number)
        current = Current(number, segment, writes)
        with self._writing:
            write_current(self._state, self._key, current)
            self._current = current
            self._stand_on(base, view.count)
        self._log.drop(segment)
        remove_others(self._state, number)
        self._merged(self)

    def close(self) -> None:
        """Waits for a merge that is under way, and ends writing."""
        if self._merging is not None:
            self._merging.join()
        with self._writing:
            self._log.close()

    @property
    def _row(self) -> tuple[np.dtype, tuple[int, ...]]:
        return storage_type(self._dtype, self._width)

    def _open_base(self, number: int) -> Base:
        documents, vectors = open_snapshot(self._state, number)
        index = None
        if self._index is not None and len(documents):
            index = self._index(vectors, self._state / f"snapshot-{number}")
        return Base.of(documents, vectors, index)

    def _place(self, name: str) -> int | None:
        """The row of a document that is there."""
        base = self._view.base
        if (row := self._where.get(name)) is not None:
            return len(base) + row
        row = base.rows.get(name)
        return None if row is None or self._view.dead[row] else row

    def _places(self, ids: Sequence[str]) -> np.ndarray:
        places = {self._place(name) for name in ids} - {None}
        return np.array(sorted(places), np.int64)

    def _write(
        self, documents: Sequence[tuple[str, str]], stored: np.ndarray, removed: Sequence[str]
    ) -> int:
        """Writes down what changes and then changes it; returns how many documents were there."""
        head = json.dumps({"put": documents, "remove": removed}).encode()
        self._log.append(_LENGTH.pack(len(head)) + head + stored.tobytes())
        before = self._apply(documents, stored, removed)
        view, merging = self._view, self._merging is not None and self._merging.is_alive()
        if view.count + int(view.dead.sum()) >= self._merge_from and len(view) and not merging:
            self._merging = threading.Thread(target=self._merge_quietly, name="merge")
            self._merging.start()
        return before

    def _read(self, content: bytes) -> tuple[list[tuple[str, str]], np.ndarray, list[str]]:
        end = _LENGTH.size + _LENGTH.unpack_from(content)[0]
        head = json.loads(content[_LENGTH.size : end])
        kind, shape = self._row
        stored = np.frombuffer(content[end:], kind).reshape(-1, *shape)
        return [(name, text) for name, text in head["put"]], stored, head["remove"]

    def _apply(
        self, documents: Sequence[tuple[str, str]], stored: np.ndarray, removed: Sequence[str]
    ) -> int:
        with self._changing:
            view, dead, gone = self._view, self._view.dead, self._view.gone.copy()
            changed = [*(name for name, _ in documents), *removed]
            places = [place for name in changed if (place := self._place(name)) is not None]
            first = len(view.base)
            if any(place < first for place in places):
                dead = dead.copy()
            for place in places:
                if place < first:
                    dead[place] = True
                else:
                    gone[place - first] = True
            for name in removed:
                self._where.pop(name, None)
            count, new = view.count, view.count + len(documents)
            vectors = _with_room(view.vectors, count, new)
            vectors[count:new] = decoded(stored)
            for row, (name, text) in enumerate(documents, start=count):
                view.ids.append(name)
                view.texts.append(text)
                self._where[name] = row
            gone = np.concatenate([gone, np.zeros(len(documents), bool)])
            self._view = dataclasses.replace(view, dead=dead, vectors=vectors, gone=gone)
            self._writes += 1
            if self._touched is not None:
                self._touched.update(changed)
            return len(places)

    def _stand_on(self, base: Base, merged: int) -> None:
        """Replaces the base by one that has the first `merged` documents added to the old one."""
        with self._changing:
            view, touched = self._view, self._touched
            dead = np.zeros(len(base), bool)
            for name in touched:
                if (row := base.rows.get(name)) is not None:
                    dead[row] = True
            left = {name: row - merged for name, row in self._where.items() if row >= merged}
            self._where, self._touched = left, None
            vectors = _with_room(view.vectors[merged : view.count], view.count - merged, 64)
            self._view = View(
                base, dead, view.ids[merged:], view.texts[merged:], vectors, view.gone[merged:]
            )

    def _merge_quietly(self) -> None:
        try:
            self.merge()
        except Exception:  # Nothing is lost: a later write tries again.
            logger.exception("documents were not merged")
            self._touched, self._merge_from = None, 2 * self._merge_from


def _stored(vectors: BaseVectors) -> np.ndarray:
    return vectors.records if isinstance(vectors, StoredVectors) else vectors


def _with_room(vectors: np.ndarray, count: int, needed: int) -> np.ndarray:
    """An array with the first `count` vectors and room for so many; searches may read the old."""
    if needed <= len(vectors):
        return vectors
    grown = np.empty((max(needed, 2 * len(vectors)), vectors.shape[1]), np.float32)
    grown[:count] = vectors[:count]
    return grown
