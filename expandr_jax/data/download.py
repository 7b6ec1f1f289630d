"""Where a run's data come from: a path, or a file of the network that is the one asked for."""

import contextlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path, PurePosixPath

from expandr_jax.data.settings import DataSettings
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file
from expandr_jax.runtime.progress import QUIET, Reporter

CACHE = "~/.cache/expandr-jax"
_BLOCK = 1 << 20
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_TIMEOUT = 60.0  # Seconds without a byte.


def data_path(config: DataSettings, reporter: Reporter) -> Path:
    """The path of the config's section `data`, or the file of its url, downloaded if need be.

    Raises:
        UserError: Neither or both are given, or the file cannot be had.
    """
    if config.path and config.url:
        raise UserError("data.path and data.url: expected one of them")
    if config.path:
        return Path(config.path)
    if not config.url:
        raise UserError("data.path is missing: --config.data.path=...")
    return download(config.url, config.sha256, config.cache or CACHE, reporter)


def download(url: str, sha256: str, cache: str | os.PathLike, reporter: Reporter = QUIET) -> Path:
    """Returns a file of the cache, downloaded first if it is not there or was altered there.

    Args:
        url: http:// or https://.
        sha256: The file's sha256, in hex; another file is refused.
        cache: A directory, made if absent. The file lies in a folder named by its hash.
        reporter: Where progress is shown.

    Raises:
        UserError: The URL or hash is malformed, the file cannot be had whole, or it is another.
    """
    parts = urllib.parse.urlsplit(url)
    name = PurePosixPath(urllib.parse.unquote(parts.path)).name
    if parts.scheme not in ("http", "https") or not parts.hostname or not name:
        raise UserError(f"{url}: expected http:// or https:// and the name of a file")
    if not _SHA256.fullmatch(sha256):
        raise UserError(f"{url}: sha256 {sha256!r}; expected 64 hex digits: what is it to be?")
    path = Path(cache).expanduser() / sha256.lower()[:16] / name
    if path.exists() and hash_file(path) == sha256.lower():
        return path
    part = path.with_name(f".{name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(url, part, reporter)
        if (found := hash_file(part)) != sha256.lower():
            raise UserError(f"{url}: sha256 is {found}, expected {sha256.lower()}; not kept")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot download it to {path}: {_reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):  # Not made, or already in its place.
            part.unlink()
    return path


def _write(url: str, part: Path, reporter: Reporter) -> None:
    """Writes what the server sends."""
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(part, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)  # Not every server says it.
        with reporter.progress(f"bytes of {url.rsplit('/', 1)[-1]}", total or _BLOCK) as advance:
            while block := response.read(_BLOCK):
                file.write(block)
                advance(len(block))
        file.flush()
        os.fsync(file.fileno())
        if total and file.tell() != total:
            raise http.client.HTTPException(f"it ended after {file.tell():,} of {total:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
    return " ".join(str(reason).split()) or type(error).__name__
