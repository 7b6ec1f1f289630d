"""Tables of text in parquet files, read row by row."""

import contextlib
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files

TYPES = re.compile(r"(large_)?string|u?int\d+|float|double|null")
LIST = re.compile(r"(large_)?list<\w+: ((large_)?string|null)( not null)?>")
ROWS_AT_ONCE = 4096


def on_disk(files: Files, name: str) -> Path:
    """Where a file is; UserError: it is inside an archive."""
    if not files.root.is_dir():
        raise UserError(f"{files.path(name)}: cannot be read inside a zip; unpack the archive")
    return files.path(name)


def parquet_columns(files: Files, name: str) -> list[str]:
    """The names of a parquet file's columns; raises as `read_parquet`."""
    with _opened(files, name) as table:
        return table.schema_arrow.names


def read_parquet(
    files: Files, name: str, wanted: Collection[str], lists: Collection[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields rows of a parquet file: where each stands, and its fields that are `wanted`.

    Raises:
        UserError: the file cannot be read, or one of these columns is no text and no number, or one
            of `lists` no list of texts.
    """
    path = files.path(name)
    with _opened(files, name) as table:
        named = table.schema_arrow.names
        columns = [column for column in (*wanted, *lists) if column in named]
        for column in columns:
            kind = table.schema_arrow.field(column).type
            types, expected = TYPES, "text or number"
            if column in lists:
                types, expected = LIST, "lists of texts"
            if not types.fullmatch(str(kind)):
                raise UserError(f"{path}: column {column!r} is {kind}; expected {expected}")
        number = 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row


@contextlib.contextmanager
def _opened(files: Files, name: str) -> Iterator[Any]:
    """The table of a file; what is wrong with it is said in a line."""
    import pyarrow  # Takes half a second, and most collections have no parquet.
    import pyarrow.parquet

    path = on_disk(files, name)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: cannot read it: {reason}") from None
