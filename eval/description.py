"""What `eval.data` says of any texts: how long they are, and which deserve a look."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from expandr_jax.data.duplicates import words
from expandr_jax.weights.hf import open_model
from expandr_jax.weights.sentence_transformers import read_settings
from expandr_jax.weights.source import locate

Length = Callable[[Sequence[str]], list[int]]

MOST_PLACES = 3  # Places that a warning names.
TEXTS_AT_ONCE = 1024
UNLIMITED = 10**9  # Tokens; a tokenizer without a limit says this or more.


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long texts are.

    Attributes:
        unit: "tokens" or "words".
        limit: Tokens that the retriever reads of a text, or None.
        of: Texts to their lengths.
    """

    unit: str
    limit: int | None
    of: Length

    @property
    def header(self) -> list[str]:
        """Names of the columns that `cells` fills."""
        names = [f"mean {self.unit}", "median", "95 %", "longest"]
        return names + ([f"over the limit of {self.limit}"] if self.limit else [])

    def count(self, texts: Sequence[str]) -> list[int]:
        """The length of each text."""
        starts = range(0, len(texts), TEXTS_AT_ONCE)
        return [n for i in starts for n in self.of(texts[i : i + TEXTS_AT_ONCE])]

    def cells(self, counts: Sequence[int]) -> list[str]:
        """A row of a table of lengths; empty cells where there are none."""
        if not counts:
            return [""] * len(self.header)
        cells = [f"{np.mean(counts):.1f}"]
        cells += [f"{np.percentile(counts, share):.0f}" for share in (50, 95, 100)]
        if self.limit:
            cells.append(f"{np.mean(np.array(counts) > self.limit):.1%}")
        return cells


def word_lengths() -> Lengths:
    """Lengths in words."""
    return Lengths("words", None, lambda texts: [len(words(text)) for text in texts])


def token_lengths(source: str) -> Lengths:
    """Lengths in the tokens of a retriever, whose weights are not loaded.

    Raises:
        UserError: There is no such model, or no tokenizer with it.
    """
    path = locate(source)
    tokenizer = open_model(source).tokenizer()
    settings = read_settings(path) if path.is_dir() else None

    def lengths(texts: Sequence[str]) -> list[int]:
        encoded = tokenizer(list(texts))
        return [len(ids) for ids in encoded["input_ids"]]

    limit = min(tokenizer.model_max_length, (settings and settings.max_length) or UNLIMITED)
    return Lengths("tokens", limit if limit < UNLIMITED else None, lengths)


def warning_lines(found: Mapping[str, Sequence[str]]) -> list[str]:
    """A line a kind, with how often it was found and the first places; none for what was not."""
    return [
        f"{len(places):,} {what}: {', '.join(places[:MOST_PLACES])}"
        + (", ..." if len(places) > MOST_PLACES else "")
        for what, places in found.items()
        if places
    ]
