"""Rows in a file without a name, and some rows of many: each is read when it is asked for."""

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from expandr_jax.files.scratch import give_up, writing


class StoredRows(Sequence[Any]):
    """Rows of JSON, of which eight bytes each are in memory; slices are `Picked`.

    Args:
        rows: Read once.
        what: What they are, for a message.

    Raises:
        UserError: They cannot be written.
    """

    def __init__(self, rows: Iterable[Any], what: str):
        self._starts, start = array("q", [0]), 0
        with writing(what):
            self._file = tempfile.TemporaryFile(prefix="expandr-rows-")  # noqa: SIM115
        weakref.finalize(self, give_up, self._file)
        for row in rows:
            # Not escaped, which would double what is not Latin; half a character is one of JSON's.
            line = json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass")
            start += len(line)
            self._starts.append(start)
            with writing(what):
                self._file.write(line)
        with writing(what):
            self._file.flush()

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Picked(self, range(len(self))[at])
        number = range(len(self))[at]
        start, end = self._starts[number : number + 2]
        # Not by the file's position, which threads have in common.
        return json.loads(os.pread(self._file.fileno(), end - start, start))


class Picked(Sequence[Any]):
    """Some of many rows, by their numbers, and as `make` has each."""

    def __init__(
        self,
        rows: Sequence[Any],
        numbers: Sequence[int],
        make: Callable[[Any], Any] = lambda row: row,
    ):
        self._rows, self._numbers, self._make = rows, numbers, make

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, at: int | slice) -> Any:
        if isinstance(at, slice):
            return Picked(self._rows, self._numbers[at], self._make)
        return self._make(self._rows[int(self._numbers[at])])
