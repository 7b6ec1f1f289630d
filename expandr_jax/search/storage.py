"""The manifest of a saved index: what it holds, from which vectors, and its files' hashes."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
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


def empty_directory(directory: str | os.PathLike, names: Iterable[str]) -> pathlib.Path:
    """Makes `directory` ready for an index: its manifest and the files `names` are gone."""
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (_NAME, *names):
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written: {error.strerror}") from error
    return directory


def write_manifest(
    directory: pathlib.Path,
    files: Iterable[str],
    *,
    backend: str,
    size: int,
    dimension: int,
    fingerprint: str,
    options: Mapping[str, Any],
) -> None:
    """Writes the manifest, last of all, so that half an index is never taken for a whole one."""
    hashes = {name: hash_file(directory / name) for name in sorted(files)}
    manifest = Manifest(backend, size, dimension, fingerprint, dict(options), hashes)
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
