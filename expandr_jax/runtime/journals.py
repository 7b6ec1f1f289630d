"""Journals of work that several processes of a run do together or by shares."""

import glob
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from expandr_jax.files.records import Journal
from expandr_jax.runtime.processes import Processes

Row = dict[str, Any]


class CommonJournal(Journal):
    """A journal whose rows all processes come to together; the first one writes them."""

    def __init__(self, path: pathlib.Path, processes: Processes):
        self._processes = processes
        processes.main_first(lambda: Journal.__init__(self, path))

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, the same in every process, and returns when they are on disk."""
        rows = [dict(row) for row in rows]
        self._processes.once(lambda: Journal.append(self, rows))
        if not self._processes.is_main:
            self.rows.extend(rows)

    def keep(self, count: int) -> None:
        """Drops all but the first rows."""
        self._processes.once(lambda: Journal.keep(self, count))
        self.rows, self.finished = self.rows[:count], False

    def finish(self) -> None:
        """Says that this is all."""
        self._processes.once(lambda: Journal.finish(self))
        self.finished = True


class DividedJournal:
    """A journal to which each process adds rows of its own share, in a file of its own.

    Where there are several, process 0 puts the files together in the end; after a kill in the
    beginning, too, whatever number of processes the run goes on with. Until the end, `rows` lack
    what the other processes did since the beginning.

    Args:
        path: As of `Journal`; PATH.process-I has what process I has done.
        processes: Processes of the run.
        key: What tells one row from another; also their order when finished.
    """

    def __init__(self, path: pathlib.Path, processes: Processes, key: Callable[[Row], Any]):
        self._path, self._processes, self._key = path, processes, key
        self._journal = processes.main_first(self._open)
        self._own = self._journal
        if processes.count > 1 and not self._journal.finished:
            self._own = Journal(self._part(processes.index))

    @property
    def rows(self) -> list[Row]:
        """The work that is done."""
        return self._journal.rows

    @property
    def finished(self) -> bool:
        """Whether it is all there is to do."""
        return self._journal.finished

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows of this process, and returns when they are on disk."""
        self._own.append(rows)
        self._processes.files.push(later=True)

    def finish(self) -> None:
        """Waits until all have done their share; then every process has all rows, in order."""
        self._processes.barrier()
        self._journal = self._processes.main_first(self._close)
        self._remove_parts()  # Each its own, where they have no directory in common.

    def _open(self) -> Journal:
        journal = Journal(self._path)
        if self._processes.is_main and not journal.finished:
            rows = self._new_rows(journal)
            if rows:
                journal.append(rows)
        self._remove_parts()
        return journal

    def _close(self) -> Journal:
        if not self._processes.is_main:
            return Journal(self._path)
        rows = [*self._journal.rows, *self._new_rows(self._journal)]
        self._journal.finish(sorted(rows, key=self._key))
        return self._journal

    def _new_rows(self, journal: Journal) -> list[Row]:
        """What processes have done by themselves."""
        known = {self._key(row) for row in journal.rows}
        rows = (row for part in self._parts() for row in Journal(part).rows)
        return [row for row in rows if self._key(row) not in known]

    def _part(self, index: int) -> pathlib.Path:
        return self._path.with_name(f"{self._path.name}.process-{index}")

    def _parts(self) -> list[pathlib.Path]:
        found = self._path.parent.glob(f"{glob.escape(self._path.name)}.process-*")
        return sorted({path.with_name(path.name.removesuffix(".part")) for path in found})

    def _remove_parts(self) -> None:
        for part in self._parts():
            part.unlink(missing_ok=True)
            part.with_name(f"{part.name}.part").unlink(missing_ok=True)
