"""Step A's examples in files of numbers, which processes of a host map into their memory."""

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from expandr_jax.data.ahead import Ahead
from expandr_jax.files.scratch import give_up, writing
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
from expandr_jax.objectives.packed_examples import Block, text_counts

# File -> type and shape of an entry.
_ARRAYS = {
    "tokens": (np.int32, ()), "texts": (np.int64, ()), "hashes": (np.int32, (2,)),
    "scores": (np.float64, ()), "counts": (np.int32, (4,)), "firsts": (np.int64, (3,)),
    "eases": (np.float64, ()),
}  # fmt: skip
_WHAT = "step A's examples"


class StoredExamples(Sequence[ContrastiveExample]):
    """Examples read one at a time from what `store_examples` wrote; pickled, it is paths.

    Their passages' texts are hashes, by which batches know equal ones.

    Args:
        paths: Where each of the files is.
        keeps: The files, which are there for as long as this.
    """

    def __init__(self, paths: Mapping[str, str], keeps: Sequence[BinaryIO] = ()):
        self._paths, self._keeps = paths, keeps
        self._arrays = {name: _opened(Path(paths[name]), *_ARRAYS[name]) for name in _ARRAYS}

    def __reduce__(self) -> tuple[type, tuple[Mapping[str, str]]]:
        return type(self), (self._paths,)

    def __len__(self) -> int:
        return len(self._arrays["counts"])

    def __getitem__(self, index: int) -> ContrastiveExample:
        arrays = self._arrays
        expansions, negatives, others, known = arrays["counts"][index].tolist()
        text, hash_, passage = arrays["firsts"][index].tolist()
        count = 2 + expansions + negatives + others
        ends = arrays["texts"][text : text + count + 1].tolist()
        ids = [arrays["tokens"][a:b] for a, b in itertools.pairwise(ends)]
        count = 1 + negatives + others
        hashes = [h.tobytes() for h in arrays["hashes"][hash_ : hash_ + count + known]]
        scores = arrays["scores"][passage : passage + count].tolist()
        scores = [None if score != score else score for score in scores]
        ease = arrays["eases"][index].item()
        passages = [*map(Passage, ids[1 + expansions :], hashes[:count], scores)]
        return ContrastiveExample(
            query=ids[0],
            expansions=ids[1 : 1 + expansions],
            positive=passages[0],
            negatives=passages[1 : 1 + negatives],
            other_positives=passages[1 + negatives :],
            known=hashes[count:],
            ease=None if ease != ease else ease,
        )


def _opened(path: Path, kind: type, shape: tuple[int, ...]) -> np.ndarray:
    if not path.stat().st_size:  # What is empty cannot be mapped.
        return np.zeros((0, *shape), kind)
    # Not as np.memmap: a slice of one takes five times as long.
    return np.asarray(np.memmap(path, kind, mode="r")).reshape(-1, *shape)


def store_examples(blocks: Iterable[Block]) -> StoredExamples:
    """Writes examples to temporary files: of each text its tokens and a hash.

    Where the system lets files be open that have no name, a kill leaves none behind.

    Args:
        blocks: As of `pack_examples`; read once, one at a time.

    Raises:
        UserError: They cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(_WHAT):
            unnamed = _opens_unnamed()
            make = tempfile.TemporaryFile if unnamed else tempfile.NamedTemporaryFile
            files = {}
            for name in _ARRAYS:
                files[name] = make(prefix="expandr-examples-")
                stack.callback(give_up, files[name])

        def write(**arrays: Any) -> None:
            with writing(_WHAT):
                for name, values in arrays.items():
                    files[name].write(np.ascontiguousarray(values, _ARRAYS[name][0]))

        write(texts=0)
        end, firsts = 0, np.zeros(3, np.int64)
        for block in blocks:
            write(**{n: block[n] for n in ("tokens", "hashes", "scores", "counts", "eases")})
            ends = end + np.cumsum(block["lengths"], dtype=np.int64)
            passages = 1 + block["counts"][:, 1:3].sum(axis=1)
            parts = text_counts(block), passages + block["counts"][:, 3], passages
            after = firsts + np.cumsum(np.stack(parts, axis=1), axis=0, dtype=np.int64)
            write(texts=ends, firsts=np.concatenate([firsts[None], after[:-1]]))
            end, firsts = int(ends[-1]), after[-1]
        with writing(_WHAT):
            for file in files.values():
                file.flush()
        stack.pop_all()  # They are closed with what is returned.
    paths = {n: _path_of(file) if unnamed else file.name for n, file in files.items()}
    return StoredExamples(paths, [*files.values()])


def _path_of(file: BinaryIO) -> str:
    """By what other processes can open a file of this one that has no name, on Linux."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _opens_unnamed() -> bool:
    """Whether the system is one where they can."""
    with tempfile.TemporaryFile() as file:
        return os.access(_path_of(file), os.R_OK)


@contextlib.contextmanager
def made_ahead(
    batches: Callable[[], ContrastiveBatches], rows: np.ndarray, workers: int
) -> Iterator[Callable[[int], tuple[dict[str, np.ndarray], np.ndarray]]]:
    """`batches().batch` of these rows; workers make it ahead, from the files of stored examples."""
    if not workers:
        yield lambda number: batches().batch(number, rows=rows)
        return
    with contextlib.ExitStack() as stack:

        @functools.cache  # Made with the first step: where all are done there is nothing to do.
        def ahead() -> Ahead:
            own = batches()
            own.prepare()  # Once, and not in each of them.
            made = Ahead(functools.partial(own.batch, rows=rows), own.steps.stop, workers)
            stack.callback(made.close)
            return made

        yield lambda number: ahead()(number)
