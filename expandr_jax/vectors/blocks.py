"""Some rows of a file of vectors whose whole lies elsewhere, as process 0's in a bucket does.

Where the file would be is its journal, PATH.jsonl, which has the sha256 of each block of it. Blocks
are kept beside that, in .NAME.rows-FIRST-LAST: what begins with a dot stays on this machine.
"""

import glob
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl
from expandr_jax.search.divided import Span
from expandr_jax.vectors.file import npy_header
from expandr_jax.vectors.stored import StoredVectors, open_vectors, storage_type


def is_within_reach(path: pathlib.Path) -> bool:
    """Whether a finished file is here, or the journal of one that is elsewhere."""
    return path.exists() or _journal(path).exists()


def width_of(path: pathlib.Path) -> int:
    """The width of the vectors of a finished file, here or elsewhere."""
    return open_vectors(path).shape[1] if path.exists() else next(_blocks(path))["width"]


def open_rows(path: pathlib.Path, start: int, end: int) -> np.ndarray | StoredVectors:
    """Rows of a file, [end - start, dim], memory-mapped; of one elsewhere, what was fetched."""
    if path.exists():
        return open_vectors(path, start, end)
    (first, _), kept = _around(path, (start, end))
    return open_vectors(kept, start - first, end - first)


def fetch_rows(
    path: pathlib.Path,
    spans: Sequence[Span],
    dtype: str,
    read: Callable[[pathlib.Path, int, int], bytes],
    advance: Callable[[int], None],
) -> None:
    """Brings rows of a file that is elsewhere to this machine, and removes what else was of it.

    What is here already is read, and fetched again where it is not as it was written.

    Args:
        path: Where the file would be.
        spans: Its rows that are wanted.
        dtype: Their type, as of `encode_to_file`.
        read: The file's bytes, from one to another.
        advance: Told how many rows more are here.

    Raises:
        UserError: What was read is not what was written, or this disk takes no more.
    """
    wanted = [_around(path, span) for span in spans]
    for other in path.parent.glob(f".{glob.escape(path.name)}.rows-*"):
        if other not in [kept for _, kept in wanted]:
            other.unlink()
    for span, (around, kept) in zip(spans, wanted, strict=True):
        try:
            with open(kept, "r+b" if kept.exists() else "w+b") as file:
                for rows in _filled(file, path, around, dtype, read):
                    advance(min(rows[1], span[1]) - max(rows[0], span[0]))
        except OSError as error:
            raise UserError(f"{kept}: cannot write it: {error.strerror}") from error


def _filled(
    file: BinaryIO,
    path: pathlib.Path,
    span: Span,
    dtype: str,
    read: Callable[[pathlib.Path, int, int], bytes],
) -> Iterator[Span]:
    """Makes a file of the blocks of a span, where it has others; yields the rows of each."""
    (first, last), width = span, next(_blocks(path))["width"]
    header = npy_header(dtype, last - first, width)
    size = np.dtype(storage_type(dtype, width)).itemsize
    if file.read(len(header)) != header:
        file.seek(0)
        file.write(header)
    row = 0
    for block in _blocks(path):
        start, row = row, row + block["rows"]
        if not first <= start < last:
            continue
        place = len(header) + (start - first) * size
        file.seek(place)
        if _hash(file.read(block["rows"] * size)) != block["sha256"]:
            data = read(path, len(header) + start * size, len(header) + row * size)
            if _hash(data) != block["sha256"]:
                raise UserError(
                    f"{path}: what others have of vectors {start} to {row} is damaged; the same "
                    "commands make it again"
                )
            file.seek(place)
            file.write(data)
        yield start, row
    file.truncate(len(header) + (last - first) * size)
    file.flush()
    os.fsync(file.fileno())


def _around(path: pathlib.Path, span: Span) -> tuple[Span, pathlib.Path]:
    """The rows of the whole blocks that have those of a span, and the file that has these."""
    row, first, last = 0, None, 0
    for block in _blocks(path):
        start, row = row, row + block["rows"]
        if start < span[1] and row > span[0]:
            first, last = start if first is None else first, row
    return (first or 0, last), path.with_name(f".{path.name}.rows-{first or 0}-{last}")


def _blocks(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What the journal says of each block, in order."""
    fields = {"rows": int, "width": int, "sha256": str}
    return (row for _, row in read_jsonl(_journal(path), fields))


def _journal(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f"{path.name}.jsonl")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
