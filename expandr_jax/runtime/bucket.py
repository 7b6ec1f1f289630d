"""Objects of a bucket, read and written whole, and errors of that in one line."""

import fnmatch
import importlib.util
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

from expandr_jax.errors import UserError

SCHEME = "gs://"
FRESH = {"cache_control": "no-store"}  # What anybody may read is otherwise kept for an hour.
REQUEST_TRIES = 3  # A request that had no answer; gcsfs itself tries those six times that failed.


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is the address of something in a bucket."""
    return str(path).startswith(SCHEME)


class Bucket:
    """The objects below an address; the network is used by the methods alone.

    Args:
        address: gs://BUCKET or gs://BUCKET/PREFIX.

    Raises:
        UserError: It is no address, or gcsfs is not installed; the methods: the bucket is not
            there, cannot be reached, or refuses.
    """

    def __init__(self, address: str):
        inside = address.removeprefix(SCHEME).rstrip("/")
        self.address = SCHEME + inside
        if not inside or inside.startswith("/"):
            raise UserError(f"{address}: expected gs://BUCKET/DIRECTORY")
        if importlib.util.find_spec("gcsfs") is None:
            raise UserError(
                f"{address}: a bucket needs gcsfs: pip install -c requirements.lock -e '.[gcs]'"
            )
        # What gcsfs would look up of a bucket's kind takes a permission that a run does not need.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        for name in ("absl", "asyncio", "gcsfs"):  # They, Orbax by the first, print what is raised.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        import fsspec  # Imported where it is used: it takes half a second.

        # Other processes write objects, too. Orbax, by etils.epath, has its settings from here.
        fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
        self._files = self._try("", lambda: fsspec.filesystem("gs"))

    def path(self, name: str) -> str:
        """The address of an object."""
        return f"{self.address}/{name}" if name else self.address

    def read(self, name: str) -> bytes | None:
        """An object's content; None: it is not there."""
        return self._try(name, lambda: self._files.cat_file(self.path(name)), needed=False)

    def read_part(self, name: str, start: int, end: int) -> bytes:
        """An object's bytes, from one to another; b"" where it is not there."""
        path = self.path(name)
        found = self._try(
            name, lambda: self._files.cat_file(path, start=start, end=end), needed=False
        )
        return found or b""

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, and replaces one of this name."""
        path = self.path(name)
        self._try(name, lambda: self._files.pipe_file(path, content, fixed_key_metadata=FRESH))

    def upload(self, file: pathlib.Path, name: str) -> None:
        """Uploads a file as an object."""
        path = self.path(name)
        self._try(name, lambda: self._files.put_file(str(file), path, fixed_key_metadata=FRESH))

    def download(self, name: str, path: pathlib.Path) -> bool:
        """Downloads an object to a file; False: there is no such object."""

        def fetch() -> bool:
            self._files.get_file(self.path(name), str(path))
            return True

        path.parent.mkdir(parents=True, exist_ok=True)
        return bool(self._try(name, fetch, needed=False))

    def remove(self, name: str) -> None:
        """Removes an object, if it is there."""
        self._try(name, lambda: self._files.rm_file(self.path(name)), needed=False)

    def names(self, pattern: str) -> list[str]:
        """Names of the objects of one directory that match a pattern."""
        directory = pattern.rpartition("/")[0]
        path = self.path(directory)
        found = self._try(directory, lambda: self._files.ls(path, detail=False), needed=False)
        start = len(self.address.removeprefix(SCHEME)) + 1
        return sorted(n[start:] for n in found or () if fnmatch.fnmatch(n[start:], pattern))

    def _try(self, name: str, request: Callable[[], Any], *, needed: bool = True) -> Any:
        """What a request gives; None where what it is for is not `needed` and not there."""
        for attempt in range(REQUEST_TRIES):
            try:
                return request()
            except FileNotFoundError:
                if not needed:
                    return None
                raise UserError(f"{self.path(name)}: there is no such bucket") from None
            except TimeoutError as error:
                if attempt == REQUEST_TRIES - 1:
                    raise self._refused(name, error) from None
            except Exception as error:  # Those of aiohttp, requests, google.auth and gcsfs.
                raise self._refused(name, error) from None
        return None

    def _refused(self, name: str, error: Exception) -> UserError:
        text = " ".join(str(error).split())
        if getattr(error, "errno", None) is not None and getattr(error, "filename", None):
            return UserError(f"{error.filename}: {error.strerror}")  # A file here.
        if text.startswith("Forbidden") or getattr(error, "code", None) in (401, 403, "401", "403"):
            reason = "no permission; see that this account may read and write objects there"
        elif type(error).__module__.startswith("google.auth"):
            reason = f"no credentials ({text[:200]}); try: gcloud auth application-default login"
        else:
            reason = f"cannot be reached: {text[:200] or type(error).__name__}"
        return UserError(f"{self.path(name)}: {reason}; the same command goes on from here")
