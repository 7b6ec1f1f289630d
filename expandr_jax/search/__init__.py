"""Nearest neighbours of query vectors in a corpus of vectors, behind one interface.

index = build_index(vectors)                     # ScaNN where it is installed, else exact
scores, indices = index.search(queries, k=100)   # [Q, k] each, best first
"""

import dataclasses
import os
from typing import Protocol

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.search import scann
from expandr_jax.search.bm25 import Bm25Index
from expandr_jax.search.exact import ExactIndex, ExactOptions
from expandr_jax.search.scann import ScannIndex, ScannOptions
from expandr_jax.search.storage import read_manifest
from expandr_jax.search.vectors import fingerprint

__all__ = [
    "Bm25Index",
    "ExactIndex",
    "ExactOptions",
    "Index",
    "ScannIndex",
    "ScannOptions",
    "build_index",
    "fingerprint",
    "load_index",
]


class Index(Protocol):
    """What every vector index offers; the score is the inner product.

    Attributes:
        size: number of vectors.
        dimension: their width.
        fingerprint: sha256 of the vectors, as `search.fingerprint` computes it.
    """

    size: int
    dimension: int
    fingerprint: str

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns scores [Q, min(k, N)] float32 and indices int32, best first.

        Equal scores come in the order of their indices. Queries [Q, D] that are not finite or not
        of the index's width raise UserError.
        """
        ...

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the index into `directory`, to be read by `load_index`."""
        ...


def build_index(vectors: np.ndarray, backend: str = "auto", **options) -> Index:
    """Builds an index over corpus vectors.

    Args:
        vectors: [N, D] floating point, N and D at least 1, all finite; may be memory-mapped.
        backend: "exact", "scann", or "auto": ScaNN where it is installed, else exact.
        **options: fields of ExactOptions or ScannOptions; under "auto" each backend takes its own.

    Raises:
        UserError: the vectors cannot be indexed, the backend is missing or an option is unknown.
    """
    known = {"exact": ExactOptions, "scann": ScannOptions}
    if backend not in (*known, "auto"):
        raise UserError(f"search backend {backend!r} is unknown; expected auto, exact or scann")
    chosen = backend if backend != "auto" else "scann" if scann.installed() else "exact"
    own = {field.name for field in dataclasses.fields(known[chosen])}
    accepted = own
    if backend == "auto":
        accepted = {field.name for kind in known.values() for field in dataclasses.fields(kind)}
    for name in options:
        if name not in accepted:
            raise UserError(
                f"search option {name!r} is unknown to the {backend} backend; "
                f"expected one of {', '.join(sorted(accepted))}"
            )
    settings = known[chosen](**{name: value for name, value in options.items() if name in own})
    return (ExactIndex if chosen == "exact" else ScannIndex)(vectors, settings)


def load_index(directory: str | os.PathLike, *, fingerprint: str | None = None) -> Index:
    """Loads an index that `Index.save` wrote.

    Args:
        directory: where it was saved.
        fingerprint: of the vectors that the index must have been built from; None accepts any.

    Raises:
        UserError: no index there, a damaged file, or an index of other vectors.
    """
    manifest = read_manifest(directory, fingerprint)
    return (ExactIndex if manifest.backend == "exact" else ScannIndex).load(directory, manifest)
