"""Where a run's data come from: a path, or a file of the network that is the one asked for."""

import contextlib
import functools
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from expandr_jax.data.settings import DataSettings
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file
from expandr_jax.runtime.progress import QUIET, Reporter

CACHE = "~/.cache/expandr-jax"
_BLOCK = 1 << 20
_DIGITS = {"sha256": 64, "md5": 32}  # How many a hash has, in hex.
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
    return download(config.url, config.sha256, config.cache or CACHE, reporter, md5=config.md5)


def download(
    url: str,
    sha256: str,
    cache: str | os.PathLike,
    reporter: Reporter = QUIET,
    *,
    md5: str = "",
) -> Path:
    """Returns a file of the cache, downloaded first if it is not there or was altered there.

    Args:
        url: http:// or https://.
        sha256: The file's sha256, in hex; another file is refused.
        cache: A directory, made if absent. The file lies in a folder named by its hash.
        reporter: Where progress is shown.
        md5: The file's md5, in hex, where no sha256 is known, or beside it.

    Raises:
        UserError: The URL or hash is malformed, the file cannot be had whole, or it is another.
    """
    parts = urllib.parse.urlsplit(url)
    name = PurePosixPath(urllib.parse.unquote(parts.path)).name
    if parts.scheme not in ("http", "https") or not parts.hostname or not name:
        raise UserError(f"{url}: expected http:// or https:// and the name of a file")
    asked = {"sha256": sha256.lower(), "md5": md5.lower()}
    wanted = {kind: digest for kind, digest in asked.items() if digest}
    if not wanted:
        raise UserError(f"{url}: neither sha256 nor md5; expected one of them: what is it to be?")
    for kind, digest in wanted.items():
        if not re.fullmatch(rf"[0-9a-f]{{{_DIGITS[kind]}}}", digest):
            raise UserError(f"{url}: {kind} {digest!r}; expected {_DIGITS[kind]} hex digits")
    path = Path(cache).expanduser() / next(iter(wanted.values()))[:16] / name
    if path.exists() and not _differences(path, wanted):
        return path
    part = path.with_name(f".{name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(url, part, reporter)
        for kind, found in _differences(part, wanted).items():
            raise UserError(f"{url}: {kind} is {found}, expected {wanted[kind]}; not kept")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url}: cannot download it to {path}: {_reason(error)}") from None
    finally:
        with contextlib.suppress(OSError):  # Not made, or already in its place.
            part.unlink()
    return path


def _differences(path: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """The hashes of a file that are not those wanted."""
    found = {}
    for kind in wanted:
        if kind == "sha256":
            found[kind] = hash_file(path)
        else:
            with open(path, "rb") as file:
                md5 = functools.partial(hashlib.md5, usedforsecurity=False)
                found[kind] = hashlib.file_digest(file, md5).hexdigest()
    return {kind: digest for kind, digest in found.items() if digest != wanted[kind]}


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
