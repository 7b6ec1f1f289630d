"""JSON lines in and out: checked reading, atomic writing, and a journal that survives a kill."""

import hashlib
import itertools
import json
import logging
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files
from expandr_jax.files.lines import Lines

Row = dict[str, Any]

logger = logging.getLogger(__name__)
_CHECK = "check"  # Field of a journal's lines: a checksum.
_END = "."  # Ends the last line's checksum.

# str.splitlines breaks a line at these, so a reader that uses it would see half a record.
_LINE_BREAKS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def read_jsonl(path: str | os.PathLike, fields: Mapping[str, type]) -> Iterator[tuple[int, Row]]:
    """Yields (line number from 1, object) of a JSON-lines file, checked as it is read.

    Args:
        path: a UTF-8 file, gzip-compressed if its name ends in ".gz"; blank lines are skipped.
        fields: name and type of each field that every object must have; others are let through.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8, not a JSON object, or lacks a
            field or has it with another type; it names file and line.
    """
    for number, line in read_lines(path):
        if line.strip():
            row = parse_row(f"{path}:{number}", line)
            for name, kind in fields.items():
                check_field(f"{path}:{number}", row, name, kind)
            yield number, row


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line; a reader sees the old file or the whole new one.

    Raises:
        UserError: the file cannot be written.
        ValueError: a number is NaN or infinite, which JSON does not have.
    """
    with open_jsonl(path) as write:
        write(rows)


@contextmanager
def open_jsonl(
    path: str | os.PathLike,
) -> Iterator[Callable[[Iterable[Mapping[str, Any]]], None]]:
    """Yields a function that adds rows; the file appears when the block ends well."""
    with replacing(path) as file:
        yield lambda rows: file.writelines(map(_encode, rows))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes one JSON value, indented, as `write_jsonl` does."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text, as `write_jsonl` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes bytes, as `write_jsonl` does."""
    with replacing(path) as file:
        file.write(data)


def hash_file(path: str | os.PathLike) -> str:
    """Returns the sha256 of a file's bytes, in hex."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error


def hash_json(value: Any) -> str:
    """Returns the sha256 of a value's canonical JSON (sorted keys, no spaces), in hex."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def hash_json_list(values: Iterable[Any]) -> str:
    """`hash_json` of a list of values, of which one at a time is held."""
    digest, before = hashlib.sha256(b"["), b""
    for value in values:
        digest.update(before + _canonical(value))
        before = b","
    digest.update(b"]")
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Rows(Sequence[Row]):
    """The rows of a journal's file, each read when it is asked for.

    In memory is where their lines begin, eight bytes a row. `path` is the file.
    """

    def __init__(self, path: Path, starts: array) -> None:
        self.path, self._starts, self._lines = path, starts, Lines(path)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return self.take(range(*number.indices(len(self))))
        return self.take([number])[0]

    def __iter__(self) -> Iterator[Row]:
        return self._read(self._starts)

    def take(self, numbers: Iterable[int]) -> list[Row]:
        """Several rows by their numbers, in this order."""
        return list(self._read([self._starts[number] for number in numbers]))

    def _read(self, starts: Sequence[int]) -> Iterator[Row]:
        try:
            for start in starts:
                row = json.loads(self._lines.at(start))
                del row[_CHECK]
                yield row
        except OSError as error:
            raise UserError(f"{self.path}: cannot read it: {error.strerror}") from error
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: was changed by others; start again") from None


class Journal:
    """An append-only file of finished work, from which a killed stage goes on.

    Rows are appended to `path` + ".part"; `finish` turns them into `path`. Each line carries a
    field "check", a checksum of itself and of all lines before it; the last one's ends with a stop.
    Opening the journal again gives back the rows before the first line that is cut, changed or
    missing, and goes on after them; `finished` is true only if nothing is damaged. Rows are read
    and written one at a time.

    Args:
        path: the file to make; its folder is created when first written to.

    Attributes:
        rows: the work that is done.
        finished: whether it is all there is to do.
        damage: how the file was damaged, if by more than a kill; else None.

    Raises:
        UserError: a file cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.part = Path(f"{path}.part")
        self.damage: str | None = None
        self.finished = False
        self._starts, self._check = array("q"), 0
        self.rows = Rows(self.part, self._starts)
        try:
            if self.path.exists() and self._recover(self.path, closed=True):
                self.finished = True
                # Left over when the kill came between the two steps of `finish`.
                self.part.unlink(missing_ok=True)
            elif self.path.exists():
                self._rewrite(self.rows)
                self.path.unlink()
            elif self.part.exists():
                self._recover(self.part, closed=False)
        except OSError as error:
            raise UserError(f"{self.part}: cannot recover it: {error.strerror}") from error
        if self.damage:
            logger.warning("%s; what it lacks is made again", self.damage)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows and returns when they are on disk."""
        if self.finished:
            raise ValueError(f"{self.path} is finished: nothing can be appended")
        lines = list(_checked_lines(rows, self._check))
        try:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            with open(self.part, "ab") as file:
                size = file.tell()
                try:
                    file.writelines(line for line, _ in lines)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.part, size)  # Where the disk is full, half a line stays.
                    raise
        except OSError as error:
            raise UserError(f"{self.part}: cannot write it: {error.strerror}") from error
        for line, check in lines:
            self._starts.append(size)
            size, self._check = size + len(line), check

    def keep(self, count: int) -> None:
        """Drops all but the first rows: something that the others belong to was damaged."""
        try:
            self._rewrite(itertools.islice(self.rows, count))
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.part}: cannot write it: {error.strerror}") from error
        self.finished = False

    def finish(self, rows: Iterable[Mapping[str, Any]] | None = None) -> None:
        """Makes `path` of the rows given, or of those appended, and removes the part file."""
        self._write(self.path, self.rows if rows is None else rows, closed=True)
        self.part.unlink(missing_ok=True)
        self.finished = True

    def _recover(self, path: Path, closed: bool) -> bool:
        """Finds the rows of a file up to the first that is damaged; whether none is."""
        position, end = 0, b""
        self._starts = array("q")
        self.rows = Rows(path, self._starts)
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if end:  # There is another line behind the last one.
                    self._starts.pop()
                    self.damage = f"{path}:{number - 1}: is damaged"
                    return False
                check, end = _verified(line, self._check)
                if check is None or (end and not closed):
                    # A kill may have cut the last line of an unfinished file.
                    if closed or line.endswith(b"\n"):
                        self.damage = f"{path}:{number}: is damaged"
                    if not closed:
                        os.truncate(path, position)
                    return False
                self._check = check
                self._starts.append(position)
                position += len(line)
        if closed and self._starts and not end:
            self.damage = f"{path}: lacks its end"
        return bool(end) or not closed  # No rows are soon done again, so an empty file is nothing.

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Makes the part file of rows."""
        self._write(self.part, rows, closed=False)

    def _write(self, path: Path, rows: Iterable[Mapping[str, Any]], closed: bool) -> None:
        starts, position, check = array("q"), 0, 0
        with replacing(path) as file:
            for line, last in _checked_lines(rows, 0, closed):
                file.write(line)
                starts.append(position)
                position, check = position + len(line), last
        self._starts, self._check, self.rows = starts, check, Rows(path, starts)


def _checked_lines(
    rows: Iterable[Mapping[str, Any]], check: int, closed: bool = False
) -> Iterator[tuple[bytes, int]]:
    """Lines of rows, each with a checksum of itself and, through `check`, of those before."""
    rows = iter(rows)
    row = next(rows, None)
    while row is not None:
        following = next(rows, None)
        line = _encode(dict(row))
        check = zlib.crc32(line, check)
        comma = ", " if row else ""
        end = _END if closed and following is None else ""
        yield line[:-2] + f'{comma}"{_CHECK}": "{check:08x}{end}"}}\n'.encode(), check
        row = following


def _verified(line: bytes, check: int) -> tuple[int | None, bytes]:
    """A line's checksum and end mark, if it has one; no checksum if it is damaged."""
    row, _, found = line.rpartition(f'"{_CHECK}": "'.encode())
    check = zlib.crc32(row.removesuffix(b", ") + b"}\n", check)
    for end in (b"", _END.encode()):
        if found == b'%08x%s"}\n' % (check, end):
            return check, end
    return None, b""


def read_lines(path: str | os.PathLike) -> Iterator[tuple[int, bytes]]:
    """Yields (line number from 1, line) of a file, as `Files.lines` reads and refuses it."""
    path = Path(path)
    yield from Files(path.parent, "", (path.name,)).lines(path.name)


def decode_line(where: str, line: bytes) -> str:
    """The text of a line; an error names `where`, its file and number."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason})") from None


def parse_row(where: str, line: bytes) -> Row:
    """The JSON object of a line; an error names `where`, its file and number."""
    try:
        row = json.loads(line.decode())
        if rb"\ud" in line.lower():
            json.dumps(row, ensure_ascii=False).encode()  # an unpaired surrogate is no text
    except UnicodeError as error:
        raise UserError(
            f"{where}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); expected one object a line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: found {_kind(row)}; expected a JSON object")
    return row


def note(mistake: UserError, mistakes: list[UserError] | None) -> None:
    """Adds a mistake in a line to a list of them; raises it where there is no list."""
    if mistakes is None:
        raise mistake
    mistakes.append(mistake)


def check_field(where: str, row: Row, name: str, kind: type) -> None:
    """Raises unless a row has a field of this type."""
    expected = _JSON_NAMES[kind]
    if name not in row:
        raise UserError(f'{where}: no field "{name}"; expected {expected}')
    value = row[name]
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f'{where}: field "{name}" is {_kind(value)}; expected {expected}')


_JSON_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def _kind(value: Any) -> str:
    return _JSON_NAMES[type(value)]


def _encode(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    return (text.translate(_LINE_BREAKS) + "\n").encode()


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Opens a temporary file that replaces `path` when the block ends well."""
    path = Path(path)
    # A fixed name, so that kills leave at most one behind and the next write reuses it.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # What is written may be read elsewhere meanwhile, and that may fail, too.
        named = Path(error.filename) if isinstance(error.filename, str) else path
        failed = path if named in (temporary, *path.parents) else named
        what = "cannot write it" if failed == path else f"stopped the writing of {path}"
        raise UserError(f"{failed}: {what}: {error.strerror}") from error
    finally:
        with suppress(OSError):  # gone already when all went well
            temporary.unlink()


def differences(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Names of what differs between two nested objects, as "a.b", with the values in both."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield name, before, now
