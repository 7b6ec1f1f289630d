"""A log of writes: a record is on disk before anyone is told so, and is read back whole or not.

Segments are files, numbered from 1, to the last of which records are appended. A record is its
content's length and CRC-32, the CRC-32 of these two, and the content. Only the last record of the
last segment can be torn, since the next one is written when it is on disk: it was nobody's yet, and
is cut off. Any other damage is an error, for writes behind it may have been acknowledged.
"""

import os
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from expandr_jax.errors import UserError

_MAGIC = b"expandr log 1\n"
_HEADER = struct.Struct("<III")


class Log:
    """The segments of a directory, from one number on.

    Args:
        directory: Made if absent.
        first: Segments before it are of no use any more, and are removed.

    Raises:
        UserError: A segment is missing or damaged, or the directory cannot be written.
    """

    def __init__(self, directory: pathlib.Path, first: int = 1):
        self._directory, self._segments = directory, []
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.drop(first)
            self._segments = sorted(map(_number, directory.glob("segment-*.log"))) or [first]
            if self._segments != [*range(first, first + len(self._segments))]:
                raise UserError(
                    f"{self.path(first)}: is missing; restore it or use another --state"
                )
            self._size = [self._checked(number) for number in self._segments][-1]
            self._file = self._open()
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from None

    @property
    def segment(self) -> int:
        """The number of the segment that is written."""
        return self._segments[-1]

    def path(self, number: int) -> pathlib.Path:
        """The file of a segment."""
        return self._directory / f"segment-{number:08d}.log"

    def __iter__(self) -> Iterator[bytes]:
        """Contents of all records, the oldest first."""
        for number in self._segments:
            with open(self.path(number), "rb") as file:
                file.seek(len(_MAGIC))
                while header := file.read(_HEADER.size):
                    yield file.read(_HEADER.unpack(header)[0])  # It was checked when it was opened.

    def append(self, content: bytes) -> None:
        """Adds a record and returns when it is on disk; after an OSError there is nothing of it."""
        record = _header(content) + content
        try:
            self._file.write(record)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError:
            self._file.close()  # Where the disk is full, what it still holds back is lost.
            os.truncate(self.path(self.segment), self._size)
            self._file = self._open()
            raise
        self._size += len(record)

    def rotate(self) -> int:
        """Begins another segment, and returns its number: records before it are in earlier ones."""
        self._file.close()
        self._segments.append(self.segment + 1)
        self._size = self._checked(self.segment)
        self._file = self._open()
        return self.segment

    def drop(self, first: int) -> None:
        """Removes the segments before one: what they say is kept elsewhere."""
        for path in self._directory.glob("segment-*.log"):
            if _number(path) < first:
                path.unlink()
        self._segments = [number for number in self._segments if number >= first]

    def close(self) -> None:
        """Closes the log."""
        self._file.close()

    def _open(self) -> BinaryIO:
        return open(self.path(self.segment), "ab")

    def _checked(self, number: int) -> int:
        """The size of a segment that is made if need be, without the torn end of the last one."""
        path, last = self.path(number), number == self.segment
        if last and (not path.exists() or path.stat().st_size < len(_MAGIC)):
            with open(path, "wb") as file:
                file.write(_MAGIC)
                file.flush()
                os.fsync(file.fileno())
            sync_directory(self._directory)
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise _damaged(path, 0)
            end = _whole_records(file, size)
        if end < size:
            if not (last and _is_torn(path, end, size)):
                raise _damaged(path, end)
            with open(path, "r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        return end


def sync_directory(directory: pathlib.Path) -> None:
    """Flushes a directory's entries to disk, so that they survive a loss of power."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _number(path: pathlib.Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _header(content: bytes) -> bytes:
    said = struct.pack("<II", len(content), zlib.crc32(content))
    return said + struct.pack("<I", zlib.crc32(said))


def _length(header: bytes) -> int | None:
    """What a header says of its content's length; None: it is cut, or not as it was written."""
    if len(header) < _HEADER.size or zlib.crc32(header[:8]) != _HEADER.unpack(header)[2]:
        return None
    return _HEADER.unpack(header)[0]


def _whole_records(file: BinaryIO, size: int) -> int:
    """Where the records end that are whole, in a file that is read from behind its magic."""
    end = file.tell()
    while (length := _length(header := file.read(_HEADER.size))) is not None:
        following = end + _HEADER.size + length
        if following > size or header != _header(file.read(length)):
            break
        end = following
    return end


def _is_torn(path: pathlib.Path, end: int, size: int) -> bool:
    """Whether nothing can follow the record that begins at `end`, as after a kill."""
    with open(path, "rb") as file:
        file.seek(end)
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return True
        if (length := _length(header)) is not None:
            return end + _HEADER.size + length >= size
        # After a loss of power, a file may be as long as it was to be, and empty there.
        return not any(header) and not any(file.read())


def _damaged(path: pathlib.Path, at: int) -> UserError:
    return UserError(f"{path}: is damaged at byte {at}; restore it or use another --state")
