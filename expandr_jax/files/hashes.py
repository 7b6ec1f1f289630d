"""Hashes of files that a program asks for more than once."""

import os
import time

from expandr_jax.files.records import hash_file

_SETTLED = 10.0  # Seconds after a change in which another one might bear the same time.
_known: dict[tuple[str, int, int, int, int], str] = {}


def hash_once(path: str | os.PathLike) -> str:
    """`hash_file`, for which a process reads a file once while that stays as it is.

    It is known by its place, its size and its times. Each start reads it all the same, whatever
    they were before: a disk can damage a file whose times stay, and a result must not rest on it.
    """
    try:
        found = os.stat(path)
    except OSError:
        return hash_file(path)  # Which says why it cannot be read.
    times = found.st_mtime_ns, found.st_ctime_ns
    key = os.path.abspath(path), found.st_ino, found.st_size, *times
    if key in _known:
        return _known[key]
    value = hash_file(path)
    if time.time() - max(times) / 1e9 > _SETTLED:
        _known[key] = value
    return value
