"""The manifest of a saved index: what it holds, from which vectors, and its files' hashes."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from expandr_jax.data.records import hash_file, hash_json, write_json
from expandr_jax.errors import UserError

_NAME = "index.json"
_CHECK = "sha256"  # Field of the manifest: the hash of all others.


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a saved index.

    Attributes:
        backend: "exact", "scann" or "bm25".
        size: number of vectors or texts.
        dimension: width of the vectors; for texts, how many different words they have.
        fingerprint: sha256 of the vectors or texts.
        options: fields of the backend's options.
        files: sha256 of each file of the index, by name.
    """

    backend: str
    size: int
    dimension: int
    fingerprint: str
    options: Mapping[str, Any]
    files: Mapping[str, str]

    @property
    def contents(self) -> str:
        """What was indexed, for messages."""
        return "texts" if self.backend == "bm25" else "vectors"


def save_index(
    directory: str | os.PathLike,
    index: Any,
    backend: str,
    options: Any,
    names: Iterable[str],
    write: Callable[[pathlib.Path], None],
) -> None:
    """Saves an index: its files, then the manifest, so that half an index is never taken for whole.

    Args:
        directory: where to; made if absent, and emptied of an index that it holds.
        index: has `size`, `dimension` and `fingerprint`.
        backend: its name.
        options: its options, a dataclass.
        names: files that it may have.
        write: writes those that it has into the directory.

    Raises:
        UserError: the directory cannot be written.
    """
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (_NAME, *names):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror}") from error
    write(directory)
    hashes = {n: hash_file(directory / n) for n in sorted(names) if (directory / n).exists()}
    shape = index.size, index.dimension, index.fingerprint
    manifest = Manifest(backend, *shape, dataclasses.asdict(options), hashes)
    fields = dataclasses.asdict(manifest)
    write_json(directory / _NAME, {**fields, _CHECK: hash_json(fields)})


def read_manifest(directory: str | os.PathLike, fingerprint: str | None) -> Manifest:
    """Reads a manifest and checks every file against it.

    Args:
        directory: where the index was saved.
        fingerprint: that of what the index must have been built from; None accepts any.

    Raises:
        UserError: no index there, a damaged file, or an index of something else.
    """
    path = pathlib.Path(directory) / _NAME
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
        # A changed digit of the size or of an option would give other answers, and no error.
        if fields.pop(_CHECK) != hash_json(fields):
            raise ValueError
        manifest = Manifest(**fields)
    except OSError as error:
        raise UserError(f"{path}: no saved index: {error.strerror}; build it again") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: not an index's manifest; build the index again") from error
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise UserError(
            f"{path}: the index was built from other {manifest.contents} (sha256 "
            f"{manifest.fingerprint[:12]}, expected {fingerprint[:12]}); build it again"
        )
    for name, expected in manifest.files.items():
        file = path.parent / name
        if not file.is_file() or hash_file(file) != expected:
            raise UserError(f"{file}: missing or damaged; build the index again")
    return manifest
