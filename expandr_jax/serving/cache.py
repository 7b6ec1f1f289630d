"""Expansions that were made before, in an SQLite file: the least recently used make room."""

import contextlib
import dataclasses
import json
import pathlib
import sqlite3
import threading
import time
from collections.abc import Callable

import numpy as np

from expandr_jax.errors import UserError

_FORMAT = 1
_SELDOM = 3600.0  # Seconds after which a use is noted again, and what is too old is looked for.
_ROOM = 0.9  # What part of the bound is left when room was made.
_ROW = 64  # Bytes that a row takes beside its columns, about.
_TABLE = """
CREATE TABLE IF NOT EXISTS expansions (
    key TEXT PRIMARY KEY, query TEXT, texts TEXT, vectors BLOB, bytes INTEGER, made REAL, used REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON expansions (used);
CREATE INDEX IF NOT EXISTS by_age ON expansions (made);
"""


@dataclasses.dataclass(frozen=True)
class Expansion:
    """What was written for a query.

    Attributes:
        texts: The passages; "" where the model said nothing.
        vectors: [texts, dim] float32, of each passage.
        cached: Whether it was there already.
    """

    texts: tuple[str, ...]
    vectors: np.ndarray
    cached: bool = False


class Cache:
    """Key -> expansion, in a file that holds queries as they were asked.

    Args:
        path: The file, made if absent; what another version wrote there is thrown away.
        most_bytes: What all rows together may have.
        seconds: Rows that are older count for nothing. They are removed when the file is opened,
            and within an hour of use after they have grown too old.
        now: The time, in seconds.

    Raises:
        UserError: The file cannot be opened, or is no SQLite file.
    """

    def __init__(
        self,
        path: pathlib.Path,
        most_bytes: int = 256 << 20,
        seconds: float = 90 * 86400.0,
        now: Callable[[], float] = time.time,
    ):
        self._most, self._seconds, self._now = most_bytes, seconds, now
        self._lock = threading.Lock()
        try:
            path.touch(mode=0o600)
            self._file = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")  # What is lost is made again.
            if self._file.execute("PRAGMA user_version").fetchone()[0] != _FORMAT:
                self._file.execute("DROP TABLE IF EXISTS expansions")
                self._file.execute(f"PRAGMA user_version = {_FORMAT}")
            self._file.executescript(_TABLE)
            self._bytes = self._file.execute("SELECT total(bytes) FROM expansions").fetchone()[0]
            self._forget_old(now())
        except (OSError, sqlite3.Error) as error:
            raise UserError(f"{path}: cannot be used: {error}; remove it, or --cache=off") from None

    def __len__(self) -> int:
        with self._lock:
            return self._file.execute("SELECT count(*) FROM expansions").fetchone()[0]

    def get(self, key: str) -> Expansion | None:
        """An expansion that is kept and not too old."""
        now = self._now()
        with self._lock, contextlib.suppress(sqlite3.Error):  # It is made again then.
            if now - self._looked > _SELDOM:
                self._forget_old(now)
            row = self._file.execute(
                "SELECT texts, vectors, made, used FROM expansions WHERE key = ?", (key,)
            ).fetchone()
            if row is None or row[2] < now - self._seconds:
                return None
            if row[3] < now - _SELDOM:
                self._file.execute("UPDATE expansions SET used = ? WHERE key = ?", (now, key))
            texts = tuple(json.loads(row[0]))
            vectors = np.frombuffer(row[1], np.float32).reshape(len(texts), -1)
            return Expansion(texts, vectors, cached=True)
        return None

    def put(self, key: str, query: str, expansion: Expansion) -> None:
        """Keeps an expansion, if there is room for it; where the disk is full, it is not kept."""
        texts = json.dumps(expansion.texts, ensure_ascii=False)
        vectors = np.ascontiguousarray(expansion.vectors, np.float32).tobytes()
        size = len(key) + len(query.encode()) + len(texts.encode()) + len(vectors) + _ROW
        if size > self._most:
            return
        now = self._now()
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._forget(key)
            row = (key, query, texts, vectors, size, now, now)
            self._file.execute("INSERT INTO expansions VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            self._bytes += size
            if self._bytes > self._most:
                self._make_room()

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._file.close()

    def _forget(self, key: str) -> None:
        row = self._file.execute(
            "DELETE FROM expansions WHERE key = ? RETURNING bytes", (key,)
        ).fetchone()
        self._bytes -= row[0] if row else 0

    def _forget_old(self, now: float) -> None:
        self._looked = now
        old = self._file.execute(
            "DELETE FROM expansions WHERE made < ? RETURNING bytes", (now - self._seconds,)
        )
        self._bytes -= sum(size for (size,) in old)

    def _make_room(self) -> None:
        oldest = "SELECT key FROM expansions ORDER BY used LIMIT 256"
        self._file.execute("BEGIN")
        try:
            while self._bytes > _ROOM * self._most:
                found = self._file.execute(oldest).fetchall()
                if not found:
                    break
                for (key,) in found:
                    if self._bytes > _ROOM * self._most:
                        self._forget(key)
        finally:
            self._file.execute("COMMIT")
