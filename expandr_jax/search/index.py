"""What every index offers, how it is saved, and the manifest that a saved one is checked by."""

import abc
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.hashes import hash_once
from expandr_jax.files.records import hash_file, hash_json, write_json

MANIFEST = "index.json"
_CHECK = "sha256"  # Field of the manifest: the hash of all others.


class Index(abc.ABC):
    """Search for the best of a corpus; scores are inner products of vectors, or BM25's of texts.

    Attributes:
        backend: "exact", "scann" or "bm25".
        options_type: the dataclass of the backend's options.
        file_names: what the files of a saved index may be called.
        size: number of vectors or texts.
        dimension: width of the vectors; for texts, how many different words they have.
        fingerprint: sha256 of them, as `search.fingerprint` or `text_fingerprint` computes it.
        options: what the backend was asked for.
        is_kept: whether one that was saved is better opened than built again: building takes longer
            or comes out otherwise.
    """

    backend: ClassVar[str]
    options_type: ClassVar[type]
    file_names: ClassVar[Sequence[str]]
    size: int
    dimension: int
    fingerprint: str
    options: Any
    is_kept: bool = True

    def search(self, queries: np.ndarray | Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores [Q, min(k, N)] float32 and indices int32, best first.

        Equal scores come in the order of their indices. Queries are what was indexed: vectors
        [Q, D], of which those that are not finite or not of the index's width raise UserError, or
        Q texts.
        """
        return self._search(queries, self._depth(k))

    def _depth(self, k: int) -> int:
        """How many results there are for a query where k are asked for."""
        if k < 1:
            raise UserError(f"k is {k}; a search returns at least 1 result a query")
        return min(k, self.size)

    @abc.abstractmethod
    def _search(self, queries: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
        """What `search` returns, where k is 1 to the index's size."""

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the index into `directory`, which may be moved, to be read by `load_index`.

        Raises:
            UserError: the directory cannot be written.
        """
        directory = pathlib.Path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for name in (MANIFEST, *self.file_names):
                (directory / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot be written: {error.strerror}") from error
        self._write(directory)
        written = sorted(name for name in self.file_names if (directory / name).exists())
        # Last of all, so that half an index is never taken for a whole one.
        manifest = Manifest(
            self.backend,
            self.size,
            self.dimension,
            self.fingerprint,
            dataclasses.asdict(self.options),
            {name: hash_file(directory / name) for name in written},
        )
        fields = dataclasses.asdict(manifest)
        write_json(directory / MANIFEST, {**fields, _CHECK: hash_json(fields)})

    @abc.abstractmethod
    def _write(self, directory: pathlib.Path) -> None:
        """Writes the files of the index."""

    @abc.abstractmethod
    def _open(self, directory: str | os.PathLike) -> None:
        """Opens what `_write` wrote; all else is known."""

    @classmethod
    def load(cls, directory: str | os.PathLike, manifest: "Manifest") -> "Index":
        """Opens a saved index; `load_index` reads the manifest and checks the files."""
        index = cls.__new__(cls)
        index.size, index.dimension = manifest.size, manifest.dimension
        index.fingerprint = manifest.fingerprint
        index.options = cls.options_type(**manifest.options)
        index._open(directory)
        return index


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a saved index: attributes of `Index`, and the sha256 of each file by name."""

    backend: str
    size: int
    dimension: int
    fingerprint: str
    options: Mapping[str, Any]
    files: Mapping[str, str]


def read_manifest(directory: str | os.PathLike) -> Manifest:
    """Reads a manifest and checks every file against it, as `load_index` says."""
    path = pathlib.Path(directory) / MANIFEST
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
    for name, expected in manifest.files.items():
        file = path.parent / name
        if not file.is_file() or hash_once(file) != expected:
            raise UserError(f"{file}: missing or damaged; build the index again")
    return manifest
