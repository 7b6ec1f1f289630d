"""How often texts have their words, and what BM25 makes of it, in files instead of memory.

bm25s builds its matrix from lists of all words and copies of all its entries: some 80 bytes for
each document that a word has, which is 100 GB for MS MARCO's passages if they have 150 words each.
The same numbers are made here a part at a time, to the bit. The matrix itself, 8 bytes an entry,
lies in files, too, so that the system may take its pages back.
"""

import dataclasses
import math
import os
import tempfile
import weakref
from collections.abc import Sequence

import numpy as np

from expandr_jax.files.scratch import give_up, scratch_array, writing

_COUNT = np.dtype([("word", np.int32), ("times", np.int32)])
COUNTS_AT_ONCE = 2**22  # Counts, of which some 80 bytes each are in memory.
_WHAT = "BM25's index"


@dataclasses.dataclass(frozen=True)
class BlockCounts:
    """How often each text of a block has its words.

    Attributes:
        words: Numbers of the different words of each text, one text after the other [entries].
        times: How often each stands there [entries].
        different: How many of them each text has [texts].
        lengths: Words of each text [texts].
    """

    words: np.ndarray
    times: np.ndarray
    different: np.ndarray
    lengths: np.ndarray


def count_block(words: np.ndarray, lengths: np.ndarray) -> BlockCounts:
    """Counts a block of texts: their words [words] int32 one after the other, and lengths."""
    rows = np.repeat(np.arange(len(lengths)), lengths)
    pairs, times = np.unique(rows << 32 | words, return_counts=True)
    different = np.bincount(pairs >> 32, minlength=len(lengths))
    words, times = (a.astype(np.int32) for a in (pairs & 0xFFFFFFFF, times))
    return BlockCounts(words, times, different, lengths)


def join_blocks(blocks: Sequence[BlockCounts]) -> BlockCounts:
    """Blocks one after the other, as one."""
    if len(blocks) == 1:
        return blocks[0]
    return BlockCounts(
        *(
            np.concatenate([getattr(block, field.name) for block in blocks])
            for field in dataclasses.fields(BlockCounts)
        )
    )


class WordCounts:
    """Takes blocks of texts in their order; then has BM25's matrix of them.

    Attributes:
        lengths: Words of each text, of each block.
    """

    def __init__(self, scratch: str | os.PathLike | None = None):
        """Files without a name lie in directory `scratch`; None: where the system has its own."""
        self._scratch = scratch
        with writing(_WHAT, scratch):
            self._file = tempfile.TemporaryFile(dir=scratch)  # noqa: SIM115  As long as this.
        weakref.finalize(self, give_up, self._file)
        self.lengths: list[np.ndarray] = []
        self._different: list[np.ndarray] = []
        self._having = np.zeros(0, np.int64)

    def add(self, block: BlockCounts, numbers: np.ndarray) -> None:
        """Takes a block; `numbers` [words] says which number each of its words has here."""
        counts = np.empty(len(block.words), _COUNT)
        counts["word"], counts["times"] = numbers[block.words], block.times
        with writing(_WHAT, self._scratch):
            self._file.write(counts.tobytes())  # It reports errors, and `tofile` does not.
        self.lengths.append(block.lengths)
        self._different.append(block.different)
        having = np.bincount(counts["word"], minlength=len(self._having))
        having[: len(self._having)] += self._having
        self._having = having

    def matrix(self, k1: float, b: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lucene's BM25 of every word in every text that has it.

        A word that n of N texts have counts log(1 + (N - n + 0.5) / (n + 0.5)) in each, times
        t / (t + k1 (1 - b + b l / L)), where it stands t times in a text of l words, L being the
        average. Types and the order of operations are bm25s's.

        Returns:
            Weights [entries] float32, of a word side by side; the texts' numbers [entries] int32,
            rising; and where each word's begin, and the last one's end [words + 1] int64.
        """
        lengths = np.concatenate(self.lengths)
        norms = k1 * ((1 - b) + b * lengths / lengths.mean())
        having = self._having.tolist()
        rarity = np.array([math.log(1 + (len(lengths) - n + 0.5) / (n + 0.5)) for n in having],
                          np.float32)  # fmt: skip
        ends = np.concatenate([[0], np.cumsum(self._having)])
        of_texts = np.cumsum(np.concatenate(self._different))
        with writing(_WHAT, self._scratch):
            self._file.flush()
        weights, rows = (
            scratch_array(ends[-1], kind, _WHAT, self._scratch) for kind in (np.float32, np.int32)
        )
        next_ones = ends[:-1].copy()
        self._file.seek(0)
        for start in range(0, int(ends[-1]), COUNTS_AT_ONCE):
            size = min(COUNTS_AT_ONCE, int(ends[-1]) - start) * _COUNT.itemsize
            counts = np.frombuffer(self._file.read(size), _COUNT)
            numbers = np.arange(start, start + len(counts))
            texts = np.searchsorted(of_texts, numbers, side="right")
            order = np.argsort(counts["word"], kind="stable")
            words, times, texts = counts["word"][order], counts["times"][order], texts[order]
            firsts = np.flatnonzero(np.diff(words, prepend=-1))
            each, many = words[firsts], np.diff(firsts, append=len(words))
            places = np.repeat(next_ones[each] - firsts, many) + np.arange(len(words))
            weights[places] = rarity[words] * (times / (norms[texts] + times))
            rows[places] = texts
            next_ones[each] += many
        return weights, rows, ends
