"""Step A's examples in files of numbers, which processes of a host map into their memory."""

import contextlib
import dataclasses
import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from expandr_jax.data.ahead import Ahead
from expandr_jax.objectives.contrastive_batches import (
    ContrastiveExample,
    Passage,
    known_texts,
    text_hashes,
)
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches

_ARRAYS = ("tokens", "texts", "hashes", "scores", "counts", "firsts", "eases")


class StoredExamples(Sequence[ContrastiveExample]):
    """Examples read one at a time from what `store_examples` wrote; pickled, it is a path.

    Their passages' texts are hashes, by which batches know equal ones.
    """

    def __init__(self, directory: str | os.PathLike):
        self._directory = os.fspath(directory)
        self._arrays = {
            name: np.load(Path(directory) / f"{name}.npy", mmap_mode="r") for name in _ARRAYS
        }

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self._directory,)

    def __len__(self) -> int:
        return len(self._arrays["counts"])

    def __getitem__(self, index: int) -> ContrastiveExample:
        arrays = self._arrays
        expansions, others, negatives, known = arrays["counts"][index].tolist()
        text, hash_, passage = arrays["firsts"][index].tolist()
        count = 2 + expansions + others + negatives
        ends = arrays["texts"][text : text + count + 1].tolist()
        ids = [np.asarray(arrays["tokens"][a:b]) for a, b in itertools.pairwise(ends)]
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


def store_examples(
    directory: str | os.PathLike, examples: Sequence[ContrastiveExample]
) -> StoredExamples:
    """Writes examples to a directory that is there: of each text its tokens and a hash."""
    arrays: dict[str, list] = {name: [] for name in _ARRAYS}
    firsts, ends = np.zeros(3, np.int64), [0]
    for example in examples:
        passages = [example.positive, *example.other_positives, *example.negatives]
        known = known_texts(example)
        texts = [example.query, *example.expansions, *(passage.ids for passage in passages)]
        counts = len(example.expansions), len(example.other_positives), len(example.negatives)
        arrays["counts"].append((*counts, len(known)))
        arrays["firsts"].append(firsts.copy())
        arrays["tokens"] += [np.asarray(ids, np.int32) for ids in texts]
        arrays["hashes"].append(text_hashes([*(passage.text for passage in passages), *known]))
        arrays["scores"] += [np.nan if p.score is None else p.score for p in passages]
        arrays["eases"].append(np.nan if example.ease is None else example.ease)
        firsts += len(texts), len(passages) + len(known), len(passages)
    arrays["texts"] = [*ends, *np.cumsum([len(ids) for ids in arrays["tokens"]])]
    types = {"counts": np.int32, "scores": np.float64, "eases": np.float64}
    for name, values in arrays.items():
        joined = np.concatenate(values) if name in ("tokens", "hashes") else np.array(values)
        np.save(Path(directory) / f"{name}.npy", joined.astype(types.get(name, joined.dtype)))
    return StoredExamples(directory)


@contextlib.contextmanager
def made_ahead(
    batches: ContrastiveBatches, rows: np.ndarray, workers: int
) -> Iterator[Callable[[int], tuple[dict[str, np.ndarray], np.ndarray]]]:
    """`batches.batch` of these rows; with workers they make it ahead, from files of the examples.

    The files are this process's own and lie in the system's directory for such, while it lasts.
    """
    if not workers:
        yield functools.partial(batches.batch, rows=rows)
        return
    with contextlib.ExitStack() as stack:

        @functools.cache  # Made with the first step: where all are done there is nothing to do.
        def ahead() -> Ahead:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="expandr-examples-"))
            stored = store_examples(directory, batches.examples)
            own = dataclasses.replace(batches, examples=stored)
            own.prepare()  # Once, and not in each of them.
            made = Ahead(functools.partial(own.batch, rows=rows), batches.steps.stop, workers)
            stack.callback(made.close)
            return made

        yield lambda number: ahead()(number)
