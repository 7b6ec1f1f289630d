"""Documents on disk: a memory-mapped Arrow file of ids and texts, read by id or by row.

A store is a directory that `write_documents` fills in one pass over the documents, and `seal` calls
whole. What it holds in memory does not grow with them: the operating system reads, and drops, pages
of the files. Making it takes 40 bytes a document for a while.

    documents.arrow   Arrow IPC: columns id and text, in batches, in the order they came in
    ids.npy           [2, documents] uint64: hashes of ids in rising order, and their rows
    sealed.json       written last: what the documents are of, and both files' sha256
"""

import array
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import tempfile
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from pathlib import Path
from typing import Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.hashes import hash_once
from expandr_jax.files.records import write_json
from expandr_jax.files.scratch import writing

ROWS_AT_ONCE = 4096  # A batch: what lies in memory while a store is written.
_FILES = ("documents.arrow", "ids.npy")
_SEAL = "sealed.json"

logger = logging.getLogger(__name__)


class Column(Sequence[str]):
    """Ids or texts by row; a slice of them is another column. Each is read when it is asked for.

    Args:
        batches: Arrow arrays of strings, `ROWS_AT_ONCE` in each but the last.
        rows: Which of them the column has.
    """

    def __init__(self, batches: Sequence[Any], rows: range):
        self._batches, self._rows = batches, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, at: Any) -> Any:
        rows = self._rows[at]
        if isinstance(rows, range):
            return Column(self._batches, rows)
        return self._batches[rows // ROWS_AT_ONCE][rows % ROWS_AT_ONCE].as_py()

    def __iter__(self) -> Iterator[str]:
        if self._rows.step != 1:
            yield from (self[at] for at in range(len(self)))
            return
        row, stop = self._rows.start, self._rows.stop
        while row < stop:
            batch, first = divmod(row, ROWS_AT_ONCE)
            part = self._batches[batch].slice(first, stop - row)
            yield from part.to_pylist()
            row += len(part)


class Documents(Mapping[str, str]):
    """Document id -> text, of a store; in the order in which the documents were written.

    Args:
        directory: The store.
        keeps: Kept alive with it, as a temporary directory.

    Attributes:
        directory: The store.
        ids: By row.
        texts: By row.
    """

    def __init__(self, directory: str | os.PathLike, keeps: Any = None):
        import pyarrow as pa  # Takes a fifth of a second.

        self.directory, self._keeps = Path(directory), keeps
        texts, ids = (self.directory / name for name in _FILES)
        with pa.memory_map(str(texts)) as file:  # The table keeps what it needs of it.
            table = pa.ipc.open_file(file).read_all()
        rows = range(table.num_rows)
        self.ids, self.texts = (Column(column.chunks, rows) for column in table.columns)
        index = np.load(ids, mmap_mode="r", allow_pickle=False)
        self._hashes, self._rows = np.asarray(index)

    def row(self, key: str) -> int:
        """The row of an id; KeyError: there is none."""
        if isinstance(key, str):
            wanted = np.uint64(_hash(key))
            at = int(np.searchsorted(self._hashes, wanted))
            while at < len(self._hashes) and self._hashes[at] == wanted:
                row = int(self._rows[at])
                if self.ids[row] == key:
                    return row
                at += 1
        raise KeyError(key)

    def repeated(self) -> set[str]:
        """Ids that stand in more than one row."""
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        ids = ([self.ids[int(row)] for row in self._rows[at : at + 2]] for at in same)
        return {first for first, second in ids if first == second}

    def __getitem__(self, key: str) -> str:
        return self.texts[self.row(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)

    def values(self) -> ValuesView[str]:
        return _Values(self)

    def items(self) -> ItemsView[str, str]:
        return _Items(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Documents, (str(self.directory),)


class _Values(ValuesView):
    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping.texts)


class _Items(ItemsView):
    def __iter__(self) -> Iterator[tuple[str, str]]:
        return zip(self._mapping.ids, self._mapping.texts, strict=True)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows(Mapping[str, int]):
    documents: Documents

    def __getitem__(self, key: str) -> int:
        return self.documents.row(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)

    def __len__(self) -> int:
        return len(self.documents)


def ids_of(corpus: Mapping[str, str]) -> Sequence[str]:
    """Ids of documents by row, without a copy where they are in a store."""
    return corpus.ids if isinstance(corpus, Documents) else list(corpus)


def texts_of(corpus: Mapping[str, str]) -> Sequence[str]:
    """Texts of documents by row, without a copy where they are in a store."""
    return corpus.texts if isinstance(corpus, Documents) else list(corpus.values())


def rows_of(corpus: Mapping[str, str]) -> Mapping[str, int]:
    """Document id -> row, without a copy of the ids where they are in a store."""
    if isinstance(corpus, Documents):
        return _Rows(corpus)
    return {document: row for row, document in enumerate(corpus)}


def write_documents(
    rows: Iterable[tuple[str, str]], directory: str | os.PathLike | None = None
) -> Documents:
    """Writes a store of (id, text), unsealed; an earlier one there stays readable where it is open.

    Args:
        rows: Read once. Ids may stand twice: see `Documents.repeated`.
        directory: None: a temporary one, which is removed with what is returned.

    Raises:
        UserError: It cannot be written.
    """
    import pyarrow as pa

    temporary = None
    if directory is None:
        with writing("documents"):
            temporary = tempfile.TemporaryDirectory(prefix="documents-", ignore_cleanup_errors=True)
    directory = Path(temporary.name if temporary else directory)
    schema = pa.schema([("id", pa.large_string()), ("text", pa.large_string())])
    rows, hashes = iter(rows), array.array("Q")
    parts = [directory / f".{name}" for name in _FILES]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / _SEAL).unlink(missing_ok=True)
        with pa.OSFile(str(parts[0]), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
            while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
                ids, texts = zip(*batch, strict=True)
                hashes.extend(map(_hash, ids))
                columns = [pa.array(column, pa.large_string()) for column in (ids, texts)]
                file.write_batch(pa.record_batch(columns, schema=schema))
        found = np.frombuffer(hashes, np.uint64)
        order = np.argsort(found, kind="stable")
        with open(parts[1], "wb") as file:
            np.save(file, np.stack([found[order], order.astype(np.uint64)]))
        for part, name in zip(parts, _FILES, strict=True):
            os.replace(part, directory / name)
        return Documents(directory, temporary)
    except OSError as error:
        room = "; make room, or name another place by TMPDIR" if temporary else ""
        raise UserError(f"{directory}: cannot write it: {error.strerror or error}{room}") from error
    finally:
        for part in parts:
            with contextlib.suppress(OSError):
                part.unlink()


def seal(directory: str | os.PathLike, key: str) -> None:
    """Marks a store as whole and as that of the key."""
    files = {}
    for name in _FILES:
        path = Path(directory, name)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[name] = hash_once(path)
    write_json(Path(directory, _SEAL), {"key": key, "files": files})


def sealed_key(directory: str | os.PathLike) -> str | None:
    """What the store there was sealed as that of; None where nothing says so."""
    try:
        return str(json.loads(Path(directory, _SEAL).read_bytes())["key"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def open_documents(directory: str | os.PathLike, key: str) -> Documents | None:
    """The sealed store of this key; None where it is absent, of another key, or damaged."""
    path = Path(directory, _SEAL)
    try:
        record = json.loads(path.read_bytes())
        if record["key"] != key:
            return None
        if any(hash_once(path.with_name(name)) != record["files"][name] for name in _FILES):
            raise ValueError
        return Documents(directory)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, UserError):
        logger.warning("%s: is damaged; it is made again", directory)
        return None


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
