"""The triples that a program trains on, and the collection that chooses its weights."""

import dataclasses
import os
from collections.abc import Sequence

from expandr_jax.data.beir import Collection, read_beir, source_hashes, unread_judgements
from expandr_jax.data.benchmarks import benchmark_queries, query_key
from expandr_jax.data.download import data_path
from expandr_jax.data.duplicates import near_duplicates
from expandr_jax.data.places import find_collections
from expandr_jax.data.settings import DataSettings
from expandr_jax.data.training_data import limit_queries
from expandr_jax.data.triples import Triple, read_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run


def triples_of(run: Run) -> list[Triple]:
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
    # Evaluations before and after a restart are compared, so they must be of the same data.
    dev, unread = None, set()
    if config.dev:
        files = next(iter(find_collections(config.dev).values()))
        dev, unread = source_hashes(files, ("dev",)), unread_judgements(files, ("dev",))
    kept = _without_tested(triples, config.tests, run.reporter)
    left_out = {"left_out_for_tests": len(triples) - len(kept)} if config.tests else {}
    noted = run.noted(
        run.path("data", "SOURCE.json"), source | left_out | ({"dev": dev} if dev else {})
    )
    # A run that was begun before dev was noted has none.
    noted_dev = noted.pop("dev", dev)
    if noted_dev is not None:  # Older runs noted all splits.
        noted_dev = {name: of for name, of in noted_dev.items() if name not in unread}
    if {name: noted.get(name) for name in source} != source:
        raise UserError(f"{given}: is not the file this run began with; use a new --workdir")
    if noted_dev != dev:
        raise UserError(f"{config.dev}: is not the data this run began with; use a new --workdir")
    return kept


def _without_tested(
    triples: list[Triple], tests: Sequence[str], reporter: Reporter
) -> list[Triple]:
    """The triples whose query is none of `data.tests`, nor nearly one; says how many are not."""
    if not tests:
        return triples
    tested = sorted(benchmark_queries(tests))
    near = near_duplicates((triple.query for triple in triples), tested)
    kept = [triple for triple, like in zip(triples, near, strict=True) if not like]
    if left_out := len(triples) - len(kept):
        reporter.say(f"{left_out} training queries are left out: they are test queries, too")
    return kept


def dev_of(config: DataSettings) -> Collection | None:
    """The collection of data.dev with the dev queries that are evaluated; None: there is none.

    Raises:
        UserError: It cannot be read, or cannot tell good weights from bad ones.
    """
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


def say_leaks(triples: Sequence[Triple], dev: Collection, reporter: Reporter) -> None:
    """Says how many of the dev queries are trained on, if any."""
    judged = dev.qrels["dev"]
    trained = {query_key(triple.query) for triple in triples}
    leaked = sum(query_key(dev.queries[query]) in trained for query in judged)
    if leaked:
        reporter.say(
            f"{leaked} of {len(judged)} dev queries are training queries, too: the dev measure "
            "says nothing of new queries there"
        )


def triple_names(triples: Sequence[Triple], config: DataSettings) -> list[str]:
    """What messages call the triples: their file, and the line of each."""
    file = os.path.basename(config.path or config.url)
    return [f"{file}:{triple.line}" for triple in triples]
