"""Approximate search by ScaNN (arXiv 1908.10396): brute force, hashing or a tree, by size."""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
from typing import Annotated

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.search.index import Index
from expandr_jax.search.vectors import check_queries, check_vectors, fingerprint
from expandr_jax.settings import MANY, NotNegative, choice, count, number, read_section

METHODS = ("auto", "brute", "ah", "tree")
STORAGES = ("float32", "bfloat16", "int8")
_SMALLEST = 16  # asymmetric hashing trains 16 centres a block
# ScaNN draws each vector on its own, so a sample can be smaller than was asked for; it refuses one
# that is smaller than the centres.
_SAMPLE = 100  # vectors that any training has at least, where there are so many
_QUERY_ROWS = 64  # brute force rounds smaller batches differently, so none is smaller
# As ScaNN names them.
_ASSETS = (
    "ah_codebook.pb", "bfloat16_dataset.npy", "datapoint_to_token.npy", "dataset.npy",
    "dp_norms.npy", "hashed_dataset.npy", "hashed_dataset_soar.npy", "int8_dataset.npy",
    "int8_multipliers.npy", "scann_assets.pbtxt", "scann_config.pb", "serialized_partitioner.pb",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ScannOptions:
    """Settings of the ScaNN index; configs/base.py says what each means.

    Brute force and hashing give the same answers every time. A tree starts from random leaves that
    ScaNN does not let us seed: where two runs must agree, build it once and save it.

    What hashing finds, in the nearest leaves or everywhere, is ranked again by exact scores: that
    of `reorder` candidates, and of k at least. Fewer than 16 vectors are searched by brute force
    whatever the method. Samples are of about the size asked for, of 100 vectors at least and, for
    a tree, of two a leaf. `soar` is lambda of arXiv 2404.00774; None is one leaf a vector.
    """

    method: Annotated[str, choice(METHODS)] = "auto"
    ah_from: Annotated[int, count(0)] = 20_000
    tree_from: Annotated[int, count(0)] = 100_000
    leaves: Annotated[int, count(1)] | None = None
    leaves_to_search: Annotated[int, count(1)] | None = None
    tree_sample: Annotated[int, count(1)] = 100_000
    tree_iterations: Annotated[int, count(1, MANY)] = 12
    soar: NotNegative | None = None
    dimensions_per_block: Annotated[int, count(1)] = 2
    anisotropic_threshold: Annotated[float, number(least=0, below=1)] = 0.2
    ah_sample: Annotated[int, count(1)] = 100_000
    ah_iterations: Annotated[int, count(1, MANY)] = 10
    reorder: Annotated[int, count(1)] = 400
    storage: Annotated[str, choice(STORAGES)] = "float32"


def method_of(options: ScannOptions, size: int) -> str:
    """How an index of so many vectors searches: "brute", "ah" or "tree"."""
    if size < _SMALLEST:
        return "brute"
    if options.method != "auto":
        return options.method
    return "brute" if size < options.ah_from else "ah" if size < options.tree_from else "tree"


def finds_all(options: ScannOptions, size: int) -> bool:
    """Whether an index of so many vectors scores each of them in float32, and so misses none."""
    return method_of(options, size) == "brute" and options.storage == "float32"


def installed() -> bool:
    """Says whether this platform has ScaNN (there is no wheel for macOS or Windows)."""
    return importlib.util.find_spec("scann") is not None


class ScannIndex(Index):
    """An index by ScaNN; its scores are exact, its neighbours may miss some."""

    backend, options_type, file_names = "scann", ScannOptions, _ASSETS

    def __init__(self, vectors: np.ndarray, options: ScannOptions = ScannOptions()):
        """Builds the index over `vectors` [N, D]; the array is not needed afterwards.

        Raises:
            UserError: ScaNN is not installed, or vectors or options cannot be used.
        """
        # ScaNN takes what is no number for its default, and says so among its own messages alone.
        self.options = read_section(ScannOptions, vars(options), "ScaNN option ")
        library = _library()
        check_vectors(vectors)  # ScaNN ends the process on NaN
        self.size, self.dimension = vectors.shape
        self.fingerprint = fingerprint(vectors)
        self._searcher = self._build(library, np.ascontiguousarray(vectors, dtype=np.float32))

    @functools.cached_property
    def method(self) -> str:
        """How this index searches, as `method_of` says."""
        return method_of(self.options, self.size)

    @property
    def is_kept(self) -> bool:
        """Whether it is saved: brute force builds the same each time, and would save a copy."""
        return self.method != "brute"

    @functools.cached_property
    def leaves(self) -> int:
        """The number of leaves, where it searches by a tree."""
        return min(self.options.leaves or max(1, math.isqrt(self.size)), self.size)

    def _build(self, library, vectors: np.ndarray):
        options = self.options
        storage = library.scann_builder.ReorderType[options.storage.upper()]
        builder = library.builder(vectors, 10, "dot_product")
        if self.method == "brute":
            return builder.score_brute_force(quantize=storage).build()
        if self.method == "tree":
            builder = builder.tree(
                num_leaves=self.leaves,
                num_leaves_to_search=min(
                    options.leaves_to_search or math.ceil(self.leaves / 4), self.leaves
                ),
                training_sample_size=max(options.tree_sample, 2 * self.leaves, _SAMPLE),
                training_iterations=options.tree_iterations,
                soar_lambda=options.soar,
            )
        builder = builder.score_ah(
            dimensions_per_block=min(options.dimensions_per_block, self.dimension),
            anisotropic_quantization_threshold=options.anisotropic_threshold,
            training_sample_size=max(options.ah_sample, _SAMPLE),
            training_iterations=options.ah_iterations,
        )
        return builder.reorder(options.reorder, quantize=storage).build()

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries = check_queries(queries, self.dimension)
        if not len(queries):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int32)
        fetch = min(k + 1, self.size)
        scores, indices = self._neighbours(queries, fetch)
        found = scores[:, :k], indices[:, :k]
        if self.method != "brute":
            return found
        # ScaNN leaves the order of ties open: fetch until the tie at the cut is whole.
        tied = np.flatnonzero(scores[:, k - 1] == scores[:, -1])
        while len(tied) and fetch < self.size:
            fetch = min(2 * fetch, self.size)
            scores, indices = self._neighbours(queries[tied], fetch)
            found[0][tied], found[1][tied] = scores[:, :k], indices[:, :k]
            tied = tied[scores[:, k - 1] == scores[:, -1]]
        return found

    def _neighbours(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(queries)
        if self.method == "brute":
            queries = np.pad(queries, ((0, -count % _QUERY_ROWS), (0, 0)))
            indices, scores = self._searcher.search_batched_parallel(queries, k)
        else:
            reorder = max(self.options.reorder, k)
            indices, scores = self._searcher.search_batched_parallel(queries, k, reorder)
        indices, scores = indices[:count].astype(np.int32), scores[:count]
        # The leaves visited held fewer than k vectors (index 0, score NaN): visit every leaf.
        short = np.isnan(scores).any(axis=1)
        if self.method == "tree" and short.any():
            indices[short], scores[short] = self._searcher.search_batched_parallel(
                queries[short], k, max(reorder, self.size), self.leaves
            )
        order = np.lexsort((indices, -scores), axis=1)
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(indices, order, axis=1)

    def _write(self, directory: pathlib.Path) -> None:
        self._searcher.serialize(str(directory), relative_path=True)

    def _open(self, directory: str | os.PathLike) -> None:
        library = _library()
        # load_searcher would unpickle this file, which we never write.
        if os.path.exists(os.path.join(directory, "scann_docids.pkl")):
            raise UserError(f"{directory}: holds scann_docids.pkl, which is not part of our index")
        self._searcher = library.load_searcher(str(directory), assets_backcompat_shim=False)


def _library():
    if not installed():
        raise UserError(
            "search backend 'scann' is not installed (there is no wheel for macOS or Windows); "
            "use backend 'exact'"
        )
    from scann.scann_ops.py import scann_ops_pybind

    return scann_ops_pybind
