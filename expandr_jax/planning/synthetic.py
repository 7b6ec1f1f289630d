"""A collection of as many documents and queries as are asked for, of made-up words, by seed.

Words are drawn as in Zipf's law, so that an index of words grows as one of a language does. Every
text is streamed to disk: nothing of it is kept.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np

from expandr_jax.files.records import write_jsonl, write_text

TEXTS_AT_ONCE = 4096  # Texts that are drawn at once.
# Texts are nearly as long as their limit, and of all lengths: half of them reach 0.84 of it.
LENGTH_POWER = 0.25
SEED = 0
_DOCUMENTS, _QUERIES = "document", "query"


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of everything a run has.

    Attributes:
        documents: How many the corpus has.
        retriever_train: Queries of step A.
        generator_train: Queries of step B.
        dev: Queries that settings are chosen on.
        test: Queries of the results.
    """

    documents: int
    retriever_train: int
    generator_train: int
    dev: int
    test: int

    def at(self, scale: float) -> "Counts":
        """These counts times `scale`, each 1 or more."""
        return Counts(*(max(1, round(n * scale)) for n in dataclasses.astuple(self)))


def word(number: int) -> str:
    """The word of a number: letters and digits, the more frequent the shorter."""
    return f"w{np.base_repr(number, 36).lower()}"


def passage(numbers: np.ndarray) -> str:
    """Words as one: a generator that splits at spaces alone writes all of them as one token."""
    return "-".join(map(word, numbers.tolist()))


def draw_words(rng: np.random.Generator, words: int, count: int) -> np.ndarray:
    """Numbers below `words`, [count], the frequency of each about 1 / (number + 1)."""
    return np.minimum((words + 1) ** rng.random(count) - 1, words - 1).astype(np.int64)


def write_collection(
    directory: pathlib.Path, counts: Counts, *, words: int, document: int, query: int
) -> None:
    """Writes a collection in BEIR's layout, with splits "train", "dev" and "test".

    Every query has one relevant document; a training query another that is judged wrong.

    Args:
        directory: Made.
        counts: How much there is; a tenth more training queries are written, since a run divides
            them by their hashes.
        words: Different words.
        document, query: Words of a text at most.
    """
    directory.mkdir(parents=True)
    vocabulary = np.array([word(i) for i in range(words)], object)
    spare = (counts.retriever_train + counts.generator_train) // 10 + 64
    splits = {
        "train": counts.retriever_train + counts.generator_train + spare,
        "dev": counts.dev,
        "test": counts.test,
    }
    texts = _texts(vocabulary, counts.documents, document, _DOCUMENTS)
    write_jsonl(directory / "corpus.jsonl", ({**row, "title": ""} for row in texts))
    texts = _texts(vocabulary, sum(splits.values()), query, _QUERIES)
    write_jsonl(directory / "queries.jsonl", texts)
    first = 0
    for split, count in splits.items():
        write_text(directory / "qrels" / f"{split}.tsv", _judgements(first, count, counts, split))
        first += count


def _texts(
    vocabulary: np.ndarray, count: int, longest: int, kind: str
) -> Iterator[Mapping[str, str]]:
    for start in range(0, count, TEXTS_AT_ONCE):
        rng = np.random.default_rng([SEED, len(kind), start])
        number = min(TEXTS_AT_ONCE, count - start)
        lengths = np.ceil(longest * rng.random(number) ** LENGTH_POWER).astype(int)
        drawn = vocabulary[draw_words(rng, len(vocabulary), int(lengths.sum()))]
        for i, text in enumerate(np.split(drawn, np.cumsum(lengths)[:-1])):
            yield {"_id": f"{kind}-{start + i}", "text": " ".join(text)}


def _judgements(first: int, count: int, counts: Counts, split: str) -> str:
    rng = np.random.default_rng([SEED, first])
    lines = ["query-id\tcorpus-id\tscore"]
    relevant, wrong = rng.integers(0, counts.documents, (2, count)).tolist()
    for i in range(count):
        lines.append(f"{_QUERIES}-{first + i}\t{_DOCUMENTS}-{relevant[i]}\t1")
        if split == "train" and wrong[i] != relevant[i]:
            lines.append(f"{_QUERIES}-{first + i}\t{_DOCUMENTS}-{wrong[i]}\t0")
    return "\n".join(lines) + "\n"
