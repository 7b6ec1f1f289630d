"""The further collections that a run is tested on: `data.tests`."""

import dataclasses

from expandr_jax.data.archive import Files
from expandr_jax.data.beir import find_collections, judgements, read_texts
from expandr_jax.data.duplicates import words
from expandr_jax.errors import UserError
from train.run import Run

# MS MARCO's test judgements are of few queries; its dev queries are what BEIR's tables report.
SPLITS = {"msmarco": "dev"}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A collection and the split of its judgements that counts."""

    files: Files
    split: str

    @property
    def queries(self) -> set[str]:
        """Ids of the judged queries."""
        return {judgement.query for judgement in judgements(self.files, self.split)}


def find_benchmarks(run: Run) -> dict[str, Benchmark]:
    """The config's test collections by name.

    Raises:
        UserError: There is none at a path, it lacks the split, or two have the same name.
    """
    found: dict[str, Benchmark] = {}
    for path in run.config.data.tests:
        for name, files in find_collections(path).items():
            if name in found:
                raise UserError(f"{path}: a second data set called {name!r}; rename one")
            found[name] = Benchmark(files, SPLITS.get(name, "test"))
            next(judgements(files, found[name].split, lambda _: None), None)
    return found


def benchmark_queries(run: Run) -> set[str]:
    """The judged queries of the config's test collections, as `query_key` has them."""
    found = set()
    for benchmark in find_benchmarks(run).values():
        judged = benchmark.queries
        texts = read_texts(benchmark.files, "queries")
        found |= {query_key(text) for query, text in texts if query in judged}
    return found


def query_key(query: str) -> str:
    """What queries have in common that differ in case, punctuation or white space alone."""
    return " ".join(words(query))
