"""BM25 over many passages: `python -m tests.bm25_speed 1000000`.

Passages of 40 words and queries of 8 are drawn by seed from a Zipf vocabulary of 200,000. It prints
the time and the memory that the index takes, and how many queries a second it answers; a sample of
them must be found as the sums of bm25s itself have it, to the bit.
"""

import pathlib
import sys
import time
from collections.abc import Iterator

import numpy as np

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


def most_memory() -> float:
    """The most GB that this process had so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def main(count: int) -> None:
    before, start = most_memory(), time.perf_counter()
    index = Bm25Index(Drawn(count, 40, 0))
    seconds = time.perf_counter() - start
    print(f"index: {seconds:.0f} s, {most_memory() - before:.2f} GB above the start at the most")
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
    main(int(sys.argv[1]))
