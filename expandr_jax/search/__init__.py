"""The best of a corpus for queries, vectors or texts, behind one interface.

index = build_index(vectors)                     # ScaNN where it is installed, else exact
index = build_index(texts)                       # BM25
scores, indices = index.search(queries, k=100)   # [Q, k] each, best first
"""

import os
from collections.abc import Sequence

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.search import scann
from expandr_jax.search.bm25 import Bm25Index, Bm25Options, text_fingerprint
from expandr_jax.search.exact import ExactIndex, ExactOptions
from expandr_jax.search.index import Index, read_manifest
from expandr_jax.search.scann import ScannIndex, ScannOptions
from expandr_jax.search.vectors import fingerprint
from expandr_jax.settings import fields_of

__all__ = [
    "Bm25Index",
    "Bm25Options",
    "ExactIndex",
    "ExactOptions",
    "Index",
    "ScannIndex",
    "ScannOptions",
    "build_index",
    "fingerprint",
    "load_index",
    "text_fingerprint",
]

BACKENDS = {
    "exact": (ExactIndex, ExactOptions),
    "scann": (ScannIndex, ScannOptions),
    "bm25": (Bm25Index, Bm25Options),
}


def build_index(corpus: np.ndarray | Sequence[str], backend: str = "auto", **options) -> Index:
    """Builds an index over a corpus.

    Args:
        corpus: vectors [N, D], floating point, N and D at least 1, all finite, may be
            memory-mapped; or texts.
        backend: "exact" or "scann" for vectors, "bm25" for texts, or "auto": BM25 for texts; for
            vectors ScaNN where it is installed, else exact.
        **options: fields of ExactOptions, ScannOptions or Bm25Options; under "auto" each backend
            takes its own.

    Raises:
        UserError: the corpus cannot be indexed so, the backend is missing or an option is unknown.
    """
    if backend not in (*BACKENDS, "auto"):
        raise UserError(
            f"search backend {backend!r} is unknown; expected auto, exact, scann or bm25"
        )
    # `StoredVectors` count as well; an array of strings is not one of vectors.
    vectors = hasattr(corpus, "ndim") and corpus.dtype.kind not in "OUT"
    chosen = backend
    if backend == "auto":
        chosen = "bm25" if not vectors else "scann" if scann.installed() else "exact"
    if vectors == (chosen == "bm25"):
        wanted, given = "a list of texts", "an array"
        if not vectors:
            wanted, given = "an array of vectors", f"a {type(corpus).__name__}"
        raise UserError(f"the {chosen} backend indexes {wanted}; {given} was given")
    known = {name: fields_of(settings).keys() for name, (_, settings) in BACKENDS.items()}
    accepted = set().union(*known.values()) if backend == "auto" else known[backend]
    for name in options:
        if name not in accepted:
            raise UserError(
                f"search option {name!r} is unknown to the {backend} backend; "
                f"expected one of {', '.join(sorted(accepted))}"
            )
    kind, settings = BACKENDS[chosen]
    return kind(corpus, settings(**{k: v for k, v in options.items() if k in known[chosen]}))


def load_index(directory: str | os.PathLike, *, fingerprint: str | None = None) -> Index:
    """Loads an index that `Index.save` wrote.

    Args:
        directory: where it was saved.
        fingerprint: that of what the index must have been built from; None accepts any.

    Raises:
        UserError: no index there, a damaged file, or an index of something else.
    """
    manifest = read_manifest(directory, fingerprint)
    if manifest.backend not in BACKENDS:
        raise UserError(
            f"{directory}: no backend {manifest.backend!r} is known here; build the index again"
        )
    kind, _ = BACKENDS[manifest.backend]
    return kind.load(directory, manifest)
