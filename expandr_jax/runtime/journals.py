"""Journals of work that several processes of a run do together or by shares."""

import functools
import glob
import itertools
import os
import pathlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, Row, Rows
from expandr_jax.runtime.processes import Processes

Key = tuple[str, int]  # Tells rows apart; the number is 0 or more, and below 2 to the 32nd.

ROWS_AT_ONCE = 4096  # Rows in memory while files are put together.
_BITS = 32
_LAST = 12  # Bytes at the end of a journal that have the checksum of all of it.


class CommonJournal:
    """A journal whose rows all processes come to together; the first one writes them.

    Attributes:
        rows: The work that is done.
        finished: Whether it is all there is to do.
    """

    def __init__(self, path: pathlib.Path, processes: Processes):
        self._processes = processes
        self._journal = processes.main_first(lambda: Journal(path))
        self.rows, self.finished = list(self._journal.rows), self._journal.finished

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, the same in every process, and returns when they are on disk."""
        rows = [dict(row) for row in rows]
        self._processes.once(lambda: self._journal.append(rows))
        self.rows += rows

    def keep(self, count: int) -> None:
        """Drops all but the first rows."""
        self._processes.once(lambda: self._journal.keep(count))
        self.rows, self.finished = self.rows[:count], False

    def finish(self) -> None:
        """Marks the journal as finished."""
        self._processes.once(lambda: self._journal.finish())
        self.finished = True


class Keys:
    """Which of many rows has a key: 16 bytes a row, and every name once."""

    def __init__(self, keys: Iterable[Key]):
        names: dict[str, int] = {}
        codes = array("q")
        for name, number in keys:
            codes.append(names.setdefault(name, len(names)) << _BITS | number)
        self._names, codes = names, np.array(codes, np.int64)
        self._rows = np.argsort(codes, kind="stable")
        self._codes = codes[self._rows]

    def __contains__(self, key: Key) -> bool:
        return self.row(key) is not None

    def row(self, key: Key) -> int | None:
        """The number of the first row that has the key."""
        name, number = key
        if name not in self._names:
            return None
        code = self._names[name] << _BITS | number
        place = int(np.searchsorted(self._codes, code))
        found = place < len(self._codes) and self._codes[place] == code
        return int(self._rows[place]) if found else None

    def count(self, name: str) -> int:
        """How many rows have the name."""
        code = self._names.get(name, -1) << _BITS
        return int(np.diff(np.searchsorted(self._codes, [code, code + (1 << _BITS)]))[0])

    def in_order(self) -> np.ndarray:
        """The first row of every key, by names and then by numbers."""
        first = np.diff(self._codes, prepend=-1) != 0
        codes, rank = self._codes[first], np.empty(len(self._names), np.int64)
        rank[[self._names[name] for name in sorted(self._names)]] = np.arange(len(rank))
        number = codes & ((1 << _BITS) - 1)
        return self._rows[first][np.lexsort((number, rank[codes >> _BITS]))]


class DividedJournal:
    """A journal to which each process adds rows of its own share, in a file of its own.

    Where there are several, process 0 puts the files together in the end; after a kill in the
    beginning, too, whatever number of processes the run goes on with. Until the end, `rows` lack
    what the other processes did since the beginning. Of rows, their keys alone are in memory.

    Args:
        path: As of `Journal`; PATH.process-I has what process I has done.
        processes: Processes of the run.
        key: What tells one row from another; also their order when finished.
    """

    def __init__(self, path: pathlib.Path, processes: Processes, key: Callable[[Row], Key]):
        self._path, self._processes, self._key = path, processes, key
        self._journal = processes.main_first(self._open)
        self._own = self._journal
        if processes.count > 1 and not self._journal.finished:
            self._own = Journal(self._part(processes.index))

    @property
    def rows(self) -> Rows:
        """The work that is done."""
        return self._journal.rows

    @property
    def finished(self) -> bool:
        """Whether it is all there is to do."""
        return self._journal.finished

    def keys(self) -> Keys:
        """The index of the rows that are known now, by their keys."""
        return Keys(map(self._key, self.rows))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows of this process, and returns when they are on disk."""
        self._own.append(rows)
        self._processes.files.push(later=True)

    def finish(self) -> None:
        """Waits until all have done their share; then every process has all rows, in order.

        Raises:
            UserError: A share lacks rows that its process wrote: it was damaged since.
        """
        processes = self._processes
        counts = processes.gather(0 if self._own is self._journal else len(self._own.rows))
        processes.barrier()
        self._journal = processes.main_first(functools.partial(self._close, counts))
        self._remove_parts()  # Each its own, where they have no directory in common.

    def _open(self) -> Journal:
        journal = Journal(self._path)
        if self._processes.is_main and not journal.finished and self._parts():
            known = Keys(map(self._key, journal.rows))
            rows = (row for part in self._parts() for row in Journal(part).rows)
            new = (row for row in rows if self._key(row) not in known)
            while block := list(itertools.islice(new, ROWS_AT_ONCE)):
                journal.append(block)
        self._remove_parts()
        return journal

    def _close(self, counts: Sequence[int]) -> Journal:
        if not self._processes.is_main:
            if self._path.exists() and self._path.stat().st_size:
                return Journal(self._path)
            # A journal takes a file of nothing for none, and would remove process 0's.
            self._own.finished = True
            return self._own
        journal = self._journal
        parts = [Journal(self._part(index)) for index, count in enumerate(counts) if count]
        for part, count in zip(parts, filter(None, counts), strict=True):
            if len(part.rows) < count:
                damage = part.damage or f"{part.part}: was cut"
                raise UserError(f"{damage}; the same command makes again what it lacks")
        sources = [journal.rows, *(part.rows for part in parts)]
        keys = Keys(self._key(row) for rows in sources for row in rows)
        journal.finish(_taken(sources, keys.in_order()))
        return journal

    def _part(self, index: int) -> pathlib.Path:
        return self._path.with_name(f"{self._path.name}.process-{index}")

    def _parts(self) -> list[pathlib.Path]:
        found = self._path.parent.glob(f"{glob.escape(self._path.name)}.process-*")
        return sorted({path.with_name(path.name.removesuffix(".part")) for path in found})

    def _remove_parts(self) -> None:
        for part in self._parts():
            part.unlink(missing_ok=True)
            part.with_name(f"{part.name}.part").unlink(missing_ok=True)


def finished_key(rows: Rows) -> str:
    """Tells a finished journal's rows from others: its file's size, and its last checksum."""
    if not rows:  # Nor need there be a file.
        return "0:"
    path = rows.path
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LAST))
            return f"{size}:{file.read().hex()}"
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


def _taken(sources: Sequence[Rows], numbers: np.ndarray) -> Iterator[Row]:
    """Rows by their numbers in all sources, one behind the other."""
    starts = np.cumsum([0, *map(len, sources)])
    for first in range(0, len(numbers), ROWS_AT_ONCE):
        block = numbers[first : first + ROWS_AT_ONCE]
        places = np.searchsorted(starts, block, side="right") - 1
        rows: dict[int, Row] = {}
        for place in np.unique(places):
            own = block[places == place]
            rows |= zip(own, sources[place].take(own - starts[place]), strict=True)
        for number in block:
            yield rows[number]
