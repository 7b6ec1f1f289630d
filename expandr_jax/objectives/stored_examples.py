"""Step A's examples in files of numbers, which processes of a host map into their memory."""

import contextlib
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expandr_jax.data.ahead import Ahead
from expandr_jax.errors import UserError
from expandr_jax.objectives.contrastive_batches import (
    ContrastiveExample,
    Passage,
    known_texts,
    text_hashes,
)
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches

# File -> type and shape of an entry.
_ARRAYS = {
    "tokens": (np.int32, ()), "texts": (np.int64, ()), "hashes": (np.int32, (2,)),
    "scores": (np.float64, ()), "counts": (np.int32, (4,)), "firsts": (np.int64, (3,)),
    "eases": (np.float64, ()),
}  # fmt: skip


class StoredExamples(Sequence[ContrastiveExample]):
    """Examples read one at a time from what `store_examples` wrote; pickled, it is a path.

    Their passages' texts are hashes, by which batches know equal ones.

    Args:
        directory: Where the files are.
        keeps: A temporary directory, which is kept as long as this.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keeps: tempfile.TemporaryDirectory | None = None,
    ):
        self._directory, self._keeps = os.fspath(directory), keeps
        self._arrays = {name: _opened(Path(directory, name), *_ARRAYS[name]) for name in _ARRAYS}

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self._directory,)

    def unlink(self) -> None:
        """Takes the files' names: what is open stays readable here, and a kill leaves nothing."""
        self._keeps.cleanup()

    def __len__(self) -> int:
        return len(self._arrays["counts"])

    def __getitem__(self, index: int) -> ContrastiveExample:
        arrays = self._arrays
        expansions, others, negatives, known = arrays["counts"][index].tolist()
        text, hash_, passage = arrays["firsts"][index].tolist()
        count = 2 + expansions + others + negatives
        ends = arrays["texts"][text : text + count + 1].tolist()
        ids = [arrays["tokens"][a:b] for a, b in itertools.pairwise(ends)]
        count = 1 + others + negatives
        hashes = [h.tobytes() for h in arrays["hashes"][hash_ : hash_ + count + known]]
        scores = arrays["scores"][passage : passage + count].tolist()
        scores = [None if score != score else score for score in scores]
        ease = arrays["eases"][index].item()
        passages = [*map(Passage, ids[1 + expansions :], hashes[:count], scores)]
        return ContrastiveExample(
            query=ids[0],
            expansions=ids[1 : 1 + expansions],
            positive=passages[0],
            negatives=passages[1 + others :],
            other_positives=passages[1 : 1 + others],
            known=hashes[count:],
            ease=None if ease != ease else ease,
        )


def _opened(path: Path, kind: type, shape: tuple[int, ...]) -> np.ndarray:
    if not path.stat().st_size:  # What is empty cannot be mapped.
        return np.zeros((0, *shape), kind)
    # Not as np.memmap: a slice of one takes five times as long.
    return np.asarray(np.memmap(path, kind, mode="r")).reshape(-1, *shape)


def store_examples(
    examples: Iterable[ContrastiveExample], directory: str | os.PathLike | None = None
) -> StoredExamples:
    """Writes examples to files: of each text its tokens and a hash.

    Args:
        examples: Read once.
        directory: Is there; None: a temporary one, where the system has such.

    Raises:
        UserError: They cannot be written.
    """
    temporary, firsts, end = None, np.zeros(3, np.int64), 0
    try:
        if directory is None:
            # What is open keeps a name where TMPDIR is on a server's disk.
            temporary = tempfile.TemporaryDirectory(
                prefix="expandr-examples-", ignore_cleanup_errors=True
            )
            directory = temporary.name
        with contextlib.ExitStack() as stack:
            files = {n: stack.enter_context(open(Path(directory, n), "wb")) for n in _ARRAYS}

            def write(name: str, values: Any) -> None:
                files[name].write(np.asarray(values, _ARRAYS[name][0]).tobytes())

            write("texts", end)
            for example in examples:
                passages = [example.positive, *example.other_positives, *example.negatives]
                known = known_texts(example)
                texts = [example.query, *example.expansions, *(passage.ids for passage in passages)]
                parts = example.expansions, example.other_positives, example.negatives, known
                write("counts", [*map(len, parts)])
                write("firsts", firsts)
                for ids in texts:
                    write("tokens", ids)
                ends = end + np.cumsum([*map(len, texts)])
                write("texts", ends)
                write("hashes", text_hashes([*(passage.text for passage in passages), *known]))
                write("scores", [np.nan if p.score is None else p.score for p in passages])
                write("eases", np.nan if example.ease is None else example.ease)
                firsts += len(texts), len(passages) + len(known), len(passages)
                end = int(ends[-1])
    except OSError as error:
        raise UserError(
            f"{directory or tempfile.gettempdir()}: cannot write step A's examples: "
            f"{error.strerror or error}; TMPDIR can name a directory with more room"
        ) from error
    return StoredExamples(directory, temporary)


@contextlib.contextmanager
def made_ahead(
    batches: ContrastiveBatches, rows: np.ndarray, workers: int
) -> Iterator[Callable[[int], tuple[dict[str, np.ndarray], np.ndarray]]]:
    """`batches.batch` of these rows; workers make it ahead, from the files of stored examples."""
    if not workers:
        yield functools.partial(batches.batch, rows=rows)
        return
    with contextlib.ExitStack() as stack:

        @functools.cache  # Made with the first step: where all are done there is nothing to do.
        def ahead() -> Ahead:
            batches.prepare()  # Once, and not in each of them.
            made = Ahead(functools.partial(batches.batch, rows=rows), batches.steps.stop, workers)
            stack.callback(made.close)
            return made

        yield lambda number: ahead()(number)
