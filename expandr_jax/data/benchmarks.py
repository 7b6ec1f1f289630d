"""Collections that systems are tested on: `data.tests` of a run, `--data` of `eval.beir`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from expandr_jax.data.beir import (
    Collection,
    judgements,
    read_texts,
    source_hashes,
    unread_judgements,
)
from expandr_jax.data.duplicates import words
from expandr_jax.data.places import find_collections
from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files

# MS MARCO's test judgements are of few queries; its dev queries are what BEIR's tables report.
TEST_SPLITS = {"msmarco": "dev"}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A collection and the split of its judgements that counts."""

    files: Files
    split: str

    @property
    def queries(self) -> set[str]:
        """Ids of the judged queries."""
        return {judgement.query for judgement in judgements(self.files, self.split)}

    def source(self, name: str, *others: str) -> dict[str, Any]:
        """What tells it, by this name, from any other; what is read is hashed for that.

        Beside its own split those of the others are read that there are.
        """
        files = source_hashes(self.files, (self.split, *others))
        return {"name": name.rpartition("/")[2], "split": self.split, "files": files}

    def unread(self, *others: str) -> set[str]:
        """The files that `source` leaves out, which older runs noted all the same."""
        return unread_judgements(self.files, (self.split, *others))


def find_benchmarks(paths: Sequence[str], split: str = "") -> dict[str, Benchmark]:
    """The collections at some paths by name.

    Args:
        paths: Directories or zips, or folders of several.
        split: Whose judgements count; "": "test", or what `TEST_SPLITS` has for the set's name.

    Raises:
        UserError: There is none at a path, it lacks the split or has no grade above 0 in it, or two
            have the same name.
    """
    found: dict[str, Benchmark] = {}
    for path in paths:
        for name, files in find_collections(path).items():
            if name in found:
                raise UserError(f"{path}: a second data set called {name!r}; rename one")
            found[name] = Benchmark(files, split or TEST_SPLITS.get(name, "test"))
            _check_judged(found[name])
    return found


def _check_judged(benchmark: Benchmark) -> None:
    """Refuses a collection whose results could be nothing but zeros."""
    bad: list[UserError] = []  # Lines, which are told as the caller wants when they are read.
    grades = (j.grade for j in judgements(benchmark.files, benchmark.split, bad))
    if not any(grade > 0 for grade in grades) and not bad:
        where = benchmark.files.path("qrels")
        raise UserError(f"{where}: no grade above 0 in split {benchmark.split!r}; expected some")


def check_relevant(collection: Collection, split: str) -> None:
    """Raises UserError where none of a split's relevant documents is there: all would score 0."""
    grades = (item for judged in collection.qrels[split].values() for item in judged.items())
    if not any(grade > 0 and document in collection.corpus for document, grade in grades):
        raise UserError(
            f"{collection.name}: no {split} query has a relevant document in the corpus; expected "
            "grades above 0 of ids as they stand there"
        )


def benchmark_queries(paths: Sequence[str]) -> set[str]:
    """The judged queries of the test collections at some paths, as `query_key` has them."""
    found = set()
    for benchmark in find_benchmarks(paths).values():
        judged = benchmark.queries
        texts = read_texts(benchmark.files, "queries")
        found |= {query_key(text) for query, text in texts if query in judged}
    return found


def query_key(query: str) -> str:
    """What queries have in common that differ in case, punctuation or white space alone."""
    return " ".join(words(query))
