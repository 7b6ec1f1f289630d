"""Files without a name, in which a program keeps what is too much for its memory."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from expandr_jax.errors import UserError


@contextlib.contextmanager
def writing(what: str, directory: str | os.PathLike | None = None) -> Iterator[None]:
    """Tells the user what cannot be written, and what helps; None: it is where the system has it.

    What is read meanwhile does not belong into the block: it may fail for other reasons.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{directory or tempfile.tempdir or 'TMPDIR'}: cannot write {what}: "
            f"{error.strerror or error}; make room, or name another place by TMPDIR"
        ) from error


def give_up(file: IO[Any]) -> None:
    """Closes a file whose content does not matter any more.

    What did not fit on a full disk is written once more then, and the error of that would take the
    place of the one that is told.
    """
    with contextlib.suppress(OSError):
        file.close()


def reserve(file: IO[Any], size: int) -> None:
    """Has the system keep so many bytes for a file that is mapped into memory.

    A full disk is told now; a page that finds no room later would end the program.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def scratch_array(
    count: int, dtype: type, what: str, directory: str | os.PathLike | None = None
) -> np.ndarray:
    """A new array in such a file: what of it is in memory is the system's choice.

    Raises:
        UserError: There is no room for it; `what` is what it is told as.
    """
    if not count:
        return np.empty(0, dtype)
    with writing(what, directory), tempfile.TemporaryFile(dir=directory) as file:
        reserve(file, int(count) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=(int(count),))
