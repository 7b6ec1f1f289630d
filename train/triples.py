"""What `train.retriever` reads: a file of triples, and the collection that chooses the weights."""

import dataclasses
import pathlib
from collections.abc import Sequence

from expandr_jax.data.beir import Collection, find_collections, read_beir, source_hashes
from expandr_jax.data.download import data_path
from expandr_jax.data.records import hash_file, write_json
from expandr_jax.data.training_data import limit_queries
from expandr_jax.data.triples import Triple, read_triples
from expandr_jax.errors import UserError
from expandr_jax.runtime.run import Run


def read_training_triples(run: Run) -> list[Triple]:
    """The triples of data.path or data.url; data/SOURCE.json describes them and data.dev.

    Raises:
        UserError: They cannot be read, or the files are others than those that the run began with.
    """
    config = run.config.data
    # It may have to be downloaded.
    given = run.processes.main_first(lambda: data_path(config, run.reporter))
    triples, skipped = read_triples(given, config.on_bad)
    queries = f"{len(triples)} training queries"
    if skipped:
        queries += f"; {len(skipped)} lines skipped, the first: {skipped[0]}"
    run.reporter.say(queries)
    source = {"name": given.name, "sha256": hash_file(given),
              "queries": len(triples), "skipped": len(skipped)}  # fmt: skip
    run.processes.main_first(lambda: _check_source(run, given, source))
    return triples


def _check_source(run: Run, given: pathlib.Path, source: dict) -> None:
    path = run.path("data", "SOURCE.json")
    dev = run.config.data.dev
    # Evaluations before and after a restart are compared, so they must be of the same data.
    files = next(iter(find_collections(dev).values())) if dev else None
    hashes = {} if files is None else {"dev": source_hashes(files)}
    if not path.exists():
        write_json(path, {**source, **hashes})
        return
    before = run.read_json(path)
    # A run that was begun before dev was noted has none.
    other_dev = before.pop("dev", hashes.get("dev")) != hashes.get("dev")
    if before != source:
        raise UserError(f"{given}: is not the file this run began with; use a new --workdir")
    if other_dev:
        raise UserError(f"{dev}: is not the data this run began with; use a new --workdir")


def read_dev(run: Run) -> Collection | None:
    """The collection of data.dev with the dev queries that are evaluated; None: there is none.

    Raises:
        UserError: It cannot be read, or cannot tell good weights from bad ones.
    """
    config = run.config.data
    if not config.dev:
        return None
    dev = read_beir(config.dev)
    if "dev" not in dev.qrels:
        raise UserError(f"{config.dev}/qrels/dev.tsv: missing; it decides what is kept")
    judged = {query: dev.qrels["dev"][query]
              for query in limit_queries(list(dev.qrels["dev"]), config.max_dev)}  # fmt: skip
    relevant = (d for grades in judged.values() for d, grade in grades.items() if grade > 0)
    if not any(document in dev.corpus for document in relevant):
        raise UserError(
            f"{config.dev}: no dev query has a relevant document, so that all weights rank alike; "
            "expected a grade above 0 of a document in the corpus"
        )
    return dataclasses.replace(dev, qrels={"dev": judged})


def say_leaks(run: Run, triples: Sequence[Triple], dev: Collection) -> None:
    """Says how many of the dev queries are trained on, if any."""
    judged = dev.qrels["dev"]
    trained = {_folded(triple.query) for triple in triples}
    leaked = sum(_folded(dev.queries[query]) in trained for query in judged)
    if leaked:
        run.console.print(
            f"  {leaked} of {len(judged)} dev queries are training queries, too: the dev measure "
            "says nothing of new queries there"
        )


def _folded(text: str) -> str:
    """Case and white space aside."""
    return " ".join(text.casefold().split())
