"""Arrays that processes hand each other in files, which are read only if they are whole."""

import os
import struct
import zipfile
import zlib

import numpy as np

from expandr_jax.errors import UserError

_DAMAGE = (
    EOFError, KeyError, RuntimeError, SyntaxError, ValueError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


def write_arrays(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Writes arrays to a file whose name ends in .npz.

    Raises:
        UserError: It cannot be written.
    """
    try:
        np.savez(path, **arrays)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


def read_arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a file by their names.

    Raises:
        UserError: It cannot be read, or is not as it was written.
    """
    try:
        with zipfile.ZipFile(path) as file:  # numpy checks nothing of what it does not read.
            damaged = file.testzip() is not None
        with np.load(path, allow_pickle=False) as file:
            arrays = {**file}
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    except _DAMAGE:
        damaged = True
    if damaged:
        raise UserError(f"{path}: is damaged; the same command makes it again")
    return arrays
