"""BM25 over many passages: `python -m tests.bm25_speed 1000000 40 WORKERS`.

Passages of so many words and queries of 8 are drawn by seed from a Zipf vocabulary of 200,000. It
prints the time and the memory that the index takes, without the pages of files, and how many
queries a second it answers; a sample of them must be found as the sums of bm25s itself have it, to
the bit.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import psutil

from expandr_jax.search import Bm25Index

VOCABULARY, QUERIES, SAMPLE, DEPTH = 200_000, 500, 20, 100


class Drawn:
    """So many texts of so many words, made as they are read."""

    def __init__(self, count: int, words: int, seed: int):
        self._count, self._words, self._seed = count, words, seed
        self._sums = np.cumsum(1 / np.arange(1, VOCABULARY + 1))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        draw = np.random.default_rng(self._seed)
        for start in range(0, self._count, 10_000):
            chances = draw.random((min(10_000, self._count - start), self._words))
            for row in np.searchsorted(self._sums, chances * self._sums[-1]).tolist():
                yield " ".join(f"w{number}" for number in row)


@contextlib.contextmanager
def watched(most: list[float]) -> Iterator[None]:
    """Appends the most MB that this process holds of its own, beyond the start."""
    process, over, held = psutil.Process(), threading.Event(), []

    def look() -> None:
        memory = process.memory_info()
        held.append((memory.rss - memory.shared) / 1e6)

    def watch() -> None:
        while not over.wait(0.01):
            look()

    look()
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        over.set()
        watching.join()
        most.append(max(held) - held[0])


def main(count: int, words: int = 40, workers: int = 1) -> None:
    Bm25Index(["one text"])  # Imports what is needed.
    start, most = time.perf_counter(), []
    with watched(most):
        index = Bm25Index(Drawn(count, words, 0), workers=workers)
    seconds = time.perf_counter() - start
    print(f"index: {seconds:.0f} s, {most[0]:.0f} MB above the start at the most")
    queries = list(Drawn(QUERIES, 8, 1))
    index.search(queries[:SAMPLE], DEPTH)
    start = time.perf_counter()
    scores, rows = index.search(queries, DEPTH)
    print(f"search: {QUERIES / (time.perf_counter() - start):.1f} queries a second")
    bm25 = index._bm25
    for row in range(SAMPLE):
        expected = bm25.get_scores_from_ids(bm25.get_tokens_ids(queries[row].split()))
        order = np.argsort(-expected, kind="stable")[:DEPTH]
        np.testing.assert_array_equal(rows[row], order)
        np.testing.assert_array_equal(scores[row], expected[order])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
