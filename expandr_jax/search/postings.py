"""Sparse vectors of documents by their components, and the best documents for sparse queries.

SciPy's product of a sparse matrix adds the numbers in one order, whatever the threads, of which
there is one a core.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.sparse

MOST_THREADS = 16  # Each has several arrays as long as the corpus.


@dataclasses.dataclass(frozen=True)
class Postings:
    """What each component, BM25's words or a vocabulary's tokens, adds to which documents.

    Attributes:
        size: Number of documents.
        weights: [count] float32, of a component side by side.
        rows: [count] int32, the documents that they are added to.
        ends: [components + 1], where each component's begin, and the last one's end.
    """

    size: int
    weights: np.ndarray
    rows: np.ndarray
    ends: np.ndarray

    def search(
        self,
        blocks: Iterable[tuple[int, Iterable[tuple[Sequence[int], np.ndarray]]]],
        count: int,
        k: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores [count, k] float32 and rows int32 of the best documents, best first.

        Args:
            blocks: The first query's number, and queries: numbers of components and their weights.
            count: Queries of all blocks.
            k: Results of a query, at most as many as there are documents.
        """
        scores = np.empty((count, k), np.float32)
        indices = np.empty((count, k), np.int32)
        threads = min(os.cpu_count() or 1, MOST_THREADS)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for first, block in blocks:
                found = pool.map(lambda query: self.best(*query, k), block)
                for row, best in enumerate(found, first):
                    scores[row], indices[row] = best
        return scores, indices

    def best(
        self, components: Sequence[int], of_components: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the k best documents for a query's components and their weights.

        A component may stand there more than once. Equal scores come in the order of the rows.
        """
        # NumPy's memory maps are arrays that cost more to slice.
        weights, rows, ends = (np.asarray(a) for a in (self.weights, self.rows, self.ends))
        parts = [slice(ends[number], ends[number + 1]) for number in components]
        starts = np.cumsum([0, *(part.stop - part.start for part in parts)])
        postings = scipy.sparse.csc_array(
            (
                np.concatenate([weights[:0], *(weights[part] for part in parts)]),
                np.concatenate([rows[:0], *(rows[part] for part in parts)]),
                starts,
            ),
            shape=(self.size, len(parts)),
        )
        scored = postings @ of_components
        found = scored[scored > 0]
        cut = np.partition(found, len(found) - k)[len(found) - k] if len(found) >= k else 0
        above = np.flatnonzero(scored > cut)
        above = above[np.argsort(-scored[above], kind="stable")]
        best = np.concatenate([above, np.flatnonzero(scored == cut)[: k - len(above)]])
        return scored[best], best
