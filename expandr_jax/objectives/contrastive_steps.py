"""Step A's batches: what each step draws of the examples, in few sizes, as any process makes it."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from expandr_jax.data.batches import (
    TRAINING_LENGTHS,
    batch_indices,
    epoch_order,
    fewest_sizes,
    pad,
)
from expandr_jax.objectives.contrastive_batches import (
    ContrastiveExample,
    known_texts,
    make_batch,
    texts_by_kind,
)
from expandr_jax.objectives.llm_ql import Corruption
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.runtime.telemetry import Contents

MOST_SIZES = 6  # Different sizes of batches in a training: each is a program to compile.


def draw_passages(
    example: ContrastiveExample, negatives: int, *, seed: int, epoch: int, query: int
) -> ContrastiveExample:
    """The example as one epoch sees it: one of its positives, at most `negatives` negatives.

    The draw is a function of (seed, epoch, query) alone; `query` numbers the examples.
    """
    if not example.other_positives and len(example.negatives) <= negatives:
        return example
    generator = np.random.default_rng([seed, epoch, query])
    positives = [example.positive, *example.other_positives]
    positive = positives.pop(int(generator.integers(len(positives))))
    kept = np.sort(generator.permutation(len(example.negatives))[:negatives])
    return dataclasses.replace(
        example,
        positive=positive,
        other_positives=positives,
        negatives=[example.negatives[i] for i in kept],
    )


def stays_plain(share: float, *, seed: int, step: int, query: int) -> bool:
    """Whether a query is left unexpanded in a step: drawn with `share` by (seed, step, query)."""
    # The fourth number keeps this apart from the draws of passages.
    return share > 0 and np.random.default_rng([seed, step, query, 1]).random() < share


@dataclasses.dataclass(frozen=True)
class ContrastiveBatches:
    """The batches of step A; each is a function of the seed and the step's number alone.

    Attributes:
        examples: The training queries.
        settings: The config's section `contrastive`.
        samples: Expansions a query; 0: queries stay plain.
        seed: What order and draws depend on.
        pad_id: Fills up rows.
        longest: No text has more tokens.
        steps: Numbers of the steps that are trained, counted from the first round's first.
        corruption: What becomes of documents whose queries are foretold; None: none are.
    """

    examples: Sequence[ContrastiveExample]
    settings: ContrastiveSettings
    samples: int
    seed: int
    pad_id: int
    longest: int
    steps: range
    corruption: Corruption | None = None

    @property
    def per_epoch(self) -> int:
        """Batches of one pass over the examples."""
        return len(self.examples) // self.settings.batch_size

    def prepare(self) -> None:
        """Computes in advance what the first step would otherwise compute of all examples."""
        _ = self.sizes, self._relevant

    def draw(
        self, number: int, rows: Sequence[int] | slice = slice(None)
    ) -> dict[int, ContrastiveExample]:
        """The examples of a step as it sees them, or of some of its rows, by their numbers."""
        return {i: self._drawn(number, i) for i in self._indices(number)[rows].tolist()}

    def _drawn(self, number: int, i: int) -> ContrastiveExample:
        """An example as a step sees it."""
        settings, seed = self.settings, self.seed
        epoch = number // self.per_epoch
        example = draw_passages(
            self.examples[i], settings.negatives, seed=seed, epoch=epoch, query=i
        )
        if stays_plain(settings.plain_share, seed=seed, step=number, query=i):
            example = dataclasses.replace(example, expansions=())
        return example

    def batch(
        self, number: int, rows: Sequence[int] | slice = slice(None)
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays of a step, as of `make_batch`, and how many tokens each of its texts has.

        With `rows` they are those rows of the batch, padded as the whole one is.
        """
        drawn = self.draw(number, rows)
        arrays = make_batch(
            [*drawn.values()],
            self.pad_id,
            self.samples,
            self.settings.negatives,
            self.longest,
            lengths=dict(zip(self._kinds, self._size(number), strict=True)),
            relevant=self._relevant,
        )
        tokens = [len(ids) for example in drawn.values() for ids in self._used(example)]
        if self.corruption is not None:
            read = [
                # The fourth number as in `stays_plain`.
                self.corruption.of(example.positive.ids, [self.seed, number, i, 2])
                for i, example in drawn.items()
            ]
            length = arrays["positive_ids"].shape[1]
            arrays["corrupted_ids"], _ = pad(read, self.pad_id, length)
            tokens += [len(e.positive.ids) + len(e.query) for e in drawn.values()]
        return arrays, np.array(tokens, np.int32)

    def contents(
        self,
        number: int,
        rows: int,
        tokens: np.ndarray,
        names: Sequence[str],
        flops: Callable[[int], float],
    ) -> Contents:
        """What a step is made of, by the tokens of so many rows: the others count as these do.

        `names` are the examples', and `flops` says how many operations training on a text of so
        many tokens takes.
        """
        named = [names[i] for i in self._indices(number)]
        share = rows / len(named)
        operations = sum(map(flops, tokens.tolist()))
        return Contents(named, round(tokens.sum() / share), operations / share)

    def _indices(self, number: int) -> np.ndarray:
        settings = self.settings
        if settings.curriculum:
            epoch, batch = divmod(number, self.per_epoch)
            first = batch * settings.batch_size
            return self._from_easy(epoch)[first : first + settings.batch_size].copy()
        return batch_indices(
            self.seed, number, len(self.examples), settings.batch_size, self._lengths,
            settings.length_window,
        )  # fmt: skip

    def _from_easy(self, epoch: int) -> np.ndarray:
        """The examples of an epoch from easy to hard; those that are alike are shuffled."""
        if (order := self._orders.get(epoch)) is None:
            order = epoch_order(self.seed, epoch, len(self.examples), self.settings.batch_size)
            order = order[np.argsort(-self._eases[order], kind="stable")]
            for old in [*self._orders][:-1]:  # Batches are made ahead: those of the next, too.
                self._orders.pop(old, None)
            self._orders[epoch] = order
        return order

    @functools.cached_property
    def _orders(self) -> dict[int, np.ndarray]:
        return {}

    @functools.cached_property
    def _eases(self) -> np.ndarray:
        return np.array([example.ease for example in self.examples], np.float64)

    @functools.cached_property
    def _lengths(self) -> np.ndarray | None:
        """Tokens of the longest text that may be used of each example, where batches need them."""
        if not self.settings.length_window:
            return None
        return np.array([
            max(map(len, [*self._used(e), *(passage.ids for passage in e.other_positives)]))
            for e in self.examples
        ])  # fmt: skip

    def _used(self, example: ContrastiveExample) -> list[Sequence[int]]:
        """The texts of a drawn example."""
        negatives = (passage.ids for passage in example.negatives)
        documents = example.positive.ids, *negatives
        return [example.query, *example.expansions[: self.samples], *documents]

    @property
    def _kinds(self) -> list[str]:
        return [*texts_by_kind((), self.samples, self.settings.negatives)]

    @functools.cached_property
    def _relevant(self) -> int:
        return max(len(known_texts(example)) for example in self.examples)

    def _size(self, number: int) -> np.ndarray:
        """Tokens that rows of each kind of text are padded to in a step: one of a few sizes."""
        needed = self._needed[number - self.steps.start]
        fitting = self.sizes[(self.sizes >= needed).all(axis=1)]
        return fitting[np.argmin(fitting @ self._rows)]

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """The sizes of this training, [`MOST_SIZES` at most, kinds]."""
        return fewest_sizes(self._needed, self._rows, MOST_SIZES)

    @property
    def _rows(self) -> list[int]:
        """Texts of a query, by kind."""
        rows = {"query": 1, "positive": 1, "negative": self.settings.negatives}
        return [(rows | {"expansion": self.samples})[kind] for kind in self._kinds]

    @functools.cached_property
    def _needed(self) -> np.ndarray:
        """The length that each kind of text of each step needs, [steps, kinds], as `pad` rounds it.

        Most follow from the bounds of what examples may be drawn to be; for the others those are
        drawn that may decide, until one does.
        """
        bounds = np.empty((len(self.examples), len(self._kinds), 2), np.int32)
        for i, example in enumerate(self.examples):
            bounds[i] = self._bounds(example)
        needed = np.empty((len(self.steps), len(self._kinds)), np.int32)
        for step, number in enumerate(self.steps):
            indices = self._indices(number)
            low, high = self._rounded(bounds[indices].max(axis=0)).T
            for i in indices[(bounds[indices, :, 1] > low).any(axis=1)].tolist():
                if (low == high).all():
                    break
                drawn = texts_by_kind(
                    [self._drawn(number, i)], self.samples, self.settings.negatives
                )
                low = np.maximum(
                    low, self._rounded([max(map(len, texts)) for (texts,) in drawn.values()])
                )
            needed[step] = low
        return needed

    def _rounded(self, lengths: Sequence[int] | np.ndarray) -> np.ndarray:
        """Each length as `data.batches.pad` rounds it."""
        buckets = np.array(TRAINING_LENGTHS)[np.searchsorted(TRAINING_LENGTHS, lengths)]
        return np.minimum(buckets, self.longest)

    def _bounds(self, example: ContrastiveExample) -> list[tuple[int, int]]:
        """For each kind, the least and the most tokens that the longest text of an example has."""
        share, count = self.settings.plain_share, self.settings.negatives
        own = [len(p.ids) for p in (example.positive, *example.other_positives)]
        query = len(example.query)
        bounds = [(query, query), (min(own), max(own))]
        if count:
            given = sorted(len(p.ids) for p in example.negatives)
            if len(given) < count:  # Its positive stands for the others.
                most = max(given, default=0)
                bounds.append((max(most, min(own)), max(most, max(own))))
            else:
                bounds.append((given[count - 1], given[-1]))
        if self.samples:
            texts = [len(ids) for ids in example.expansions[: self.samples]]
            most = max(texts + [query] * (len(texts) < self.samples))
            kept = [query] * (share > 0) + [most] * (share < 1)
            bounds.append((min(kept), max(kept)))
        return bounds
