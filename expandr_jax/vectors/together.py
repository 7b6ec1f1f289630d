"""A file of vectors that several processes make: each a part, and process 0 the file of these."""

import glob
import pathlib
from collections.abc import Callable

import numpy as np

from expandr_jax.runtime.processes import Processes
from expandr_jax.vectors.file import check_whole, count_cut
from expandr_jax.vectors.stored import open_vectors

# Vectors of the texts from one number to another, [texts, dim].
Known = Callable[[int, int], np.ndarray]


def encode_together(
    path: pathlib.Path,
    count: int,
    processes: Processes,
    encode: Callable[[pathlib.Path, slice, Known | None], None],
) -> int:
    """Makes a file of vectors, or goes on with it; all processes call it together.

    Args:
        path: The file. Parts of several processes are PATH.process-I-of-N until it is made.
        count: How many texts it is of.
        processes: Those that encode, a share of the texts each.
        encode: Called with a file, the texts that it is of and what gives their vectors, where
            these are known: makes it by `encode_to_file`, of parts with float32.

    Returns:
        How many texts were cut; where several processes made the file, once.
    """
    starts = share_starts(count, processes.count)
    names = [f"{path.name}.process-{i}-of-{processes.count}" for i in range(processes.count)]
    parts = [path.with_name(name) for name in names]
    divided, cut = processes.count > 1 and not processes.once(path.exists), 0
    if divided:
        share = slice(starts[processes.index], starts[processes.index + 1])
        if share.start < share.stop:
            encode(parts[processes.index], share, None)
        processes.barrier()
        cut = sum(processes.gather(count_cut(parts[processes.index])))

    def known(start: int, end: int) -> np.ndarray:
        """Vectors from the processes' files."""
        rows = []
        for part, first, last in zip(parts, starts, starts[1:], strict=False):
            if max(start, first) < min(end, last):
                rows.append(open_vectors(part)[max(start, first) - first : min(end, last) - first])
        return np.concatenate(rows)

    def join() -> None:
        if divided:
            for part, first, last in zip(parts, starts, starts[1:], strict=False):
                if first < last:
                    check_whole(part)
        # What is damaged of a file that was there, process 0 encodes by itself.
        encode(path, slice(0, count), known if divided else None)
        remove()

    def remove() -> None:
        for file in path.parent.glob(f"{glob.escape(path.name)}.process-*"):
            file.unlink(missing_ok=True)

    processes.once(join)
    remove()  # Each its own, where they have no directory in common.
    return cut if divided else processes.once(lambda: count_cut(path))


def progress_of_all(
    progress: Callable[[float], None], share: slice, count: int
) -> Callable[[int], None]:
    """What this process tells of its share, as progress of all items: others are as far as it."""
    return lambda done: progress(done * count / (share.stop - share.start))


def share_starts(count: int, processes: int) -> list[int]:
    """Where each process's share of so many items begins, and the last one ends."""
    return [count * share // processes for share in range(processes + 1)]
