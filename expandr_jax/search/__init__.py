"""The best of a corpus for queries, vectors or texts, behind one interface.

index = build_index(vectors)                     # ScaNN where it is installed, else exact
index = build_index(texts)                       # BM25
scores, indices = index.search(queries, k=100)   # [Q, k] each, best first
"""

import glob
import logging
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.runtime.progress import QUIET, Reporter
from expandr_jax.runtime.workers import workers_here
from expandr_jax.search import scann
from expandr_jax.search.bm25 import Bm25Index, Bm25Options, text_fingerprint, words_of
from expandr_jax.search.exact import ExactIndex, ExactOptions
from expandr_jax.search.index import MANIFEST, Index, read_manifest
from expandr_jax.search.scann import ScannIndex, ScannOptions
from expandr_jax.search.sparse import SparseIndex
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
    "SparseIndex",
    "build_index",
    "fingerprint",
    "kept_bm25",
    "kept_index",
    "load_index",
    "search_named",
    "text_fingerprint",
    "words_of",
]

logger = logging.getLogger(__name__)

BACKENDS = {kind.backend: kind for kind in (ExactIndex, ScannIndex, Bm25Index)}
SAVED_INDICES = {**BACKENDS, SparseIndex.backend: SparseIndex}  # What a saved index may be of.


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
    known = {name: fields_of(kind.options_type).keys() for name, kind in BACKENDS.items()}
    accepted = set().union(*known.values()) if backend == "auto" else known[backend]
    for name in options:
        if name not in accepted:
            raise UserError(
                f"search option {name!r} is unknown to the {backend} backend; "
                f"expected one of {', '.join(sorted(accepted))}"
            )
    own = {name: value for name, value in options.items() if name in known[chosen]}
    return BACKENDS[chosen](corpus, BACKENDS[chosen].options_type(**own))


def load_index(directory: str | os.PathLike) -> Index:
    """Loads an index that `Index.save` wrote; UserError: there is none, or a file is damaged."""
    manifest = read_manifest(directory)
    if manifest.backend not in SAVED_INDICES:
        raise UserError(
            f"{directory}: no backend {manifest.backend!r} is known here; build the index again"
        )
    return SAVED_INDICES[manifest.backend].load(directory, manifest)


def kept_index(directory: pathlib.Path, build: Callable[[], Index], *, write: bool = True) -> Index:
    """The index that is saved in a directory, else one that is built, and then saved there.

    One that is damaged is named and built again. Only what is worth it is saved: see
    `Index.is_kept`.

    Args:
        directory: Its name, NAME-KEY, says what the index is of, so that nothing of that is read
            again; those of other keys are removed when this one is saved.
        build: Makes the index.
        write: Whether it is saved; not by those who only read a run.
    """
    # Half a save has no manifest, and is nobody's damage.
    if (directory / MANIFEST).exists():
        try:
            return load_index(directory)
        except UserError as error:
            logger.warning("%s", error)
    index = build()
    if not (write and index.is_kept):
        return index
    index.save(directory)
    name = directory.name.rpartition("-")[0]
    for other in directory.parent.glob(f"{glob.escape(name)}-*"):
        if other != directory:
            shutil.rmtree(other, ignore_errors=True)
    # What a restart would have: ScaNN rounds otherwise once it is saved; files are mapped.
    return load_index(directory)


def kept_bm25(
    directory: pathlib.Path,
    texts: Collection[str],
    *,
    name: str = "bm25",
    write: bool = True,
    reporter: Reporter = QUIET,
) -> Bm25Index:
    """`kept_index` of texts for BM25, in NAME.index-KEY of a directory.

    Many of them are split by several processes of this machine; see `Bm25Index`.
    """
    key = text_fingerprint(texts)[:16]
    where = directory / f"{name}.index-{key}"
    if write:  # Made where there is to be room for it.
        directory.mkdir(parents=True, exist_ok=True)

    def build() -> Bm25Index:
        options = {"scratch": directory if write else None, "workers": workers_here()}
        with reporter.progress("BM25: documents read", len(texts)) as advance:
            return Bm25Index(texts, progress=advance, **options)

    return kept_index(where, build, write=write)


def search_named(
    search: Callable[[Any, int], tuple[np.ndarray, np.ndarray]],
    query_ids: Sequence[str],
    queries: Any,
    document_ids: Sequence[str],
    depth: int,
    *,
    drop_identical_ids: bool,
    excluded: Mapping[str, Collection[str]] | None = None,
    above: float = -np.inf,
) -> dict[str, dict[str, float]]:
    """The best documents of queries by an index's `search`: query id -> document id -> score.

    Here alone rankings are cut, and documents leave them before.

    Args:
        search: Queries (vectors or texts) and k to scores and rows, best first.
        query_ids: In the order of the queries.
        queries: What is searched for.
        document_ids: In the order of the index.
        depth: Documents a query.
        drop_identical_ids: Leave out a document whose id is the query's (ArguAna).
        excluded: Query id -> documents that are left out (BRIGHT).
        above: Results that score this or less are left out (0 for BM25: no word in common).
    """
    run, excluded = {}, excluded or {}
    # As many more as any query may lose.
    most = max((len(excluded.get(query, ())) for query in query_ids), default=0)
    found_by_query = search(queries, depth + drop_identical_ids + most)
    for query, *found in zip(query_ids, *found_by_query, strict=True):
        scores = {
            document_ids[row]: float(score)
            for score, row in zip(*found, strict=True)
            if score > above
        }
        if drop_identical_ids:
            scores.pop(query, None)
        for document in excluded.get(query, ()):
            scores.pop(document, None)
        run[query] = dict(list(scores.items())[:depth])
    return run
