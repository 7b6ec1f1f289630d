"""Lines of a file, each read when it is asked for."""

import contextlib
import functools
import os
import weakref

_AT_ONCE = 1 << 14  # Bytes; most lines are shorter.


class Lines:
    """Reads lines by where they begin; the file stays open from the first one on.

    Opening it for each of millions would take most of the time, above all where another machine
    has it.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path

    def at(self, start: int) -> bytes:
        """The line that begins there, up to its end or the file's; OSError: it cannot be read."""
        parts, end = [], -1
        while end < 0:
            # Not by the file's position, which threads have in common.
            part = os.pread(self._descriptor, _AT_ONCE, start)
            end = part.find(b"\n") if part else 0
            parts.append(part[:end] if end >= 0 else part)
            start += len(part)
        return b"".join(parts)

    @functools.cached_property
    def _descriptor(self) -> int:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, _close, descriptor)
        return descriptor


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)
