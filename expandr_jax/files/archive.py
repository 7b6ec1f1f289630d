"""The files of a data set as streams of lines: in a directory or a zip archive, gzip or not."""

import contextlib
import dataclasses
import gzip
import io
import lzma
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from expandr_jax.errors import UserError

# Text packs to a third or, where lines are much alike, a tenth; archives made to fill a disk or
# the memory pack to a thousandth.
MOST_GROWTH = 100
_SLACK = 1 << 20  # Bytes that any file may unpack to, however small.
_DEPTH = 4  # Names below a directory: DIR/cqadupstack/android/qrels/test.tsv.
_DAMAGE = (
    OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, struct.error,
    zipfile.BadZipFile,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Files:
    """Some of the files of a directory or zip archive, by name; nothing is unpacked to disk.

    Attributes:
        root: The directory or archive.
        folder: Where in it the names start: "" or "scifact/".
        names: Files below the folder, sorted, with forward slashes.
    """

    root: Path
    folder: str
    names: tuple[str, ...]

    def below(self, folder: str) -> "Files":
        """The files of a folder, which ends in a slash."""
        names = (name.removeprefix(folder) for name in self.names if name.startswith(folder))
        return Files(self.root, self.folder + folder, tuple(names))

    def path(self, name: str) -> Path:
        """Where a file is; in an archive only good for messages."""
        return self.root / f"{self.folder}{name}"

    def lines(self, name: str) -> Iterator[tuple[int, bytes]]:
        """Yields (line number from 1, line); unpacks a name that ends in ".gz".

        Raises:
            UserError: The file is missing, damaged or encrypted, or unpacks to more than
                `MOST_GROWTH` times its size.
        """
        try:
            with contextlib.ExitStack() as stack:
                file = self._open(name, stack)
                for number, line in enumerate(file, start=1):
                    yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        except _DAMAGE as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise UserError(f"{self.path(name)}: cannot read it: {reason}") from None

    def _open(self, name: str, stack: contextlib.ExitStack) -> BinaryIO:
        if self.root.is_dir():
            file = stack.enter_context(open(self.path(name), "rb"))  # noqa: SIM115 (stack closes it)
            size = os.fstat(file.fileno()).st_size
        else:
            archive = stack.enter_context(zipfile.ZipFile(self.root))
            member = archive.getinfo(self.folder + name)
            size = member.compress_size
            # zipfile never unpacks more than the size that the archive states.
            if member.file_size > _most(size):
                raise _too_large(self.path(name))
            file = stack.enter_context(archive.open(member))
        if name.endswith(".gz"):
            unpacked = stack.enter_context(gzip.GzipFile(fileobj=file))
            file = io.BufferedReader(_Bounded(unpacked, _most(size), self.path(name)), 1 << 20)
        return file


def list_files(path: str | os.PathLike) -> Files:
    """Lists a directory, `_DEPTH` names deep, or a zip archive.

    Raises:
        UserError: There is no such directory or archive, it is damaged, or a member's path leads
            outside the archive or stands twice.
    """
    path = Path(path)
    if path.is_dir():
        found = (f for depth in range(_DEPTH) for f in path.glob("*/" * depth + "*"))
        names = [file.relative_to(path).as_posix() for file in found if file.is_file()]
    elif path.suffix.lower() == ".zip":
        names = _members(path)
    else:
        raise UserError(f"{path}: no such directory; expected a BEIR data set, or one as a .zip")
    kept = (name for name in names if not re.search(r"(^|/)(\.|__MACOSX/)", name))
    return Files(path, "", tuple(sorted(kept)))


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except _DAMAGE as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read it as a zip archive: {reason}") from None
    for name in names:
        if re.match(r"/|[A-Za-z]:", name) or "\\" in name or ".." in PurePosixPath(name).parts:
            raise UserError(f"{path}: member {name!r} lies outside the archive; refused")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"{path}: member {twice!r} stands in it twice; refused")
    return names


def _most(size: int) -> int:
    return max(MOST_GROWTH * size, _SLACK)


def _too_large(path: Path) -> UserError:
    return UserError(
        f"{path}: unpacks to over {MOST_GROWTH} times its size, as no text does; refused"
    )


class _Bounded(io.RawIOBase):
    """A stream that may hold at most so many bytes."""

    def __init__(self, stream: BinaryIO, most: int, path: Path):
        self._stream, self._left, self._path = stream, most, path

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self._stream.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _too_large(self._path)
        buffer[: len(data)] = data
        return len(data)
