"""An inverted index of sparse vectors, such as SPLADE's; none of their numbers is below 0."""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.sparse

from expandr_jax.errors import UserError
from expandr_jax.files.scratch import give_up, scratch_array, writing
from expandr_jax.search.index import Index
from expandr_jax.search.postings import Postings

_ARRAYS = ("weights", "rows", "ends")
_WHAT = "an index of sparse vectors"


@dataclasses.dataclass(frozen=True)
class SparseOptions:
    """The options of a sparse index, which has none."""


class SparseIndex(Index):
    """Inner products of sparse vectors, in float32.

    Documents that share no component with a query score 0 and come last.

    Args:
        blocks: The documents' vectors in their order, [rows, dimension] each, read once.
        dimension: Components that there can be.
        fingerprint: Says what the vectors are of.

    Raises:
        UserError: There is no document.
    """

    backend, options_type = "sparse", SparseOptions
    file_names = tuple(f"{name}.npy" for name in _ARRAYS)

    def __init__(self, blocks: Iterable[scipy.sparse.csr_array], dimension: int, fingerprint: str):
        self.dimension, self.fingerprint, self.options = dimension, fingerprint, SparseOptions()
        counts, self.size = np.zeros(dimension, np.int64), 0
        with contextlib.ExitStack() as stack:
            with writing(_WHAT):
                file = tempfile.TemporaryFile()  # noqa: SIM115  Until all are counted.
            stack.callback(give_up, file)
            lengths = []
            for block in blocks:
                block = scipy.sparse.csc_array(block, dtype=np.float32)
                block.sort_indices()
                counts += np.diff(block.indptr)
                with writing(_WHAT):
                    for array in (block.data, block.indices, block.indptr):
                        np.save(file, array)
                lengths.append(block.shape[0])
                self.size += block.shape[0]
            if not self.size:
                raise UserError("a sparse index of no documents")
            ends = np.concatenate([[0], np.cumsum(counts)])
            with writing(_WHAT):
                file.flush()
            weights, rows = (
                scratch_array(ends[-1], kind, _WHAT) for kind in (np.float32, np.int32)
            )
            file.seek(0)
            free, first = ends[:-1].copy(), 0
            for length in lengths:
                data, indices, starts = (np.load(file) for _ in range(3))
                own = np.diff(starts)
                # Those of a component side by side, behind its earlier ones.
                place = np.arange(len(data)) + np.repeat(free - starts[:-1], own)
                weights[place], rows[place] = data, indices + first
                free, first = free + own, first + length
        self._postings = Postings(self.size, weights, rows, ends)

    def _search(self, queries: scipy.sparse.csr_array, k: int) -> tuple[np.ndarray, np.ndarray]:
        if queries.shape[1] != self.dimension:
            raise UserError(f"queries have {queries.shape[1]} components, not {self.dimension}")
        return self._postings.search([(0, _rows(queries))], queries.shape[0], k)

    def _write(self, directory: pathlib.Path) -> None:
        for name in _ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self._postings, name))

    def _open(self, directory: str | os.PathLike) -> None:
        arrays = (np.load(pathlib.Path(directory, name), mmap_mode="r") for name in self.file_names)
        self._postings = Postings(self.size, *arrays)


def _rows(queries: scipy.sparse.csr_array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start, end in zip(queries.indptr[:-1], queries.indptr[1:], strict=True):
        yield queries.indices[start:end], queries.data[start:end]
