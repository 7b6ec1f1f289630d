"""One table over data sets: `python -m eval.beir --data=DIR[,DIR] --systems=a,b --workdir=OUT`.

Systems are `bm25`, `dense` (the config's retriever), either with a strategy of
expandr_jax/expansion/strategies.py (`dense+q2d`, `bm25+query2doc`), `dense+prf-average`,
`dense+prf-rocchio`, the same over a corpus whose documents are expanded (`bm25@d2q`,
`dense@d2d+q2d`), fusions of any of these (`rrf:bm25:dense`), and any of them ranked again by a
cross-encoder (`rerank:dense`) or the generator (`listwise:dense`); see
expandr_jax/ranking/systems.py. `all` is the table of docs/strategies.md, without expanded
documents. What the parts of an interpolation weigh is chosen on a set's dev queries, where it has
some beside those that it is tested on. Each set gets
results.json, results.md, .tex and .csv, report.html, values.jsonl, runs/ and qrels.trec, in OUT or,
where there are several, in OUT/NAME. The same command goes on where it stopped; with other systems
it adds what is missing, and what was generated serves every system that asks for the same.
"""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console

from eval.set_ranker import LazyModels, SetRanker
from expandr_jax import metrics
from expandr_jax.config import Config, read_config, with_settings
from expandr_jax.data.beir import read_beir
from expandr_jax.data.benchmarks import Benchmark, check_relevant, find_benchmarks
from expandr_jax.data.collect import prepare_data
from expandr_jax.data.download import data_path
from expandr_jax.data.settings import DataSettings
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json, write_jsonl
from expandr_jax.metrics import METRICS
from expandr_jax.ranking.choices import as_record
from expandr_jax.ranking.results import mean_over_sets, remarks, summary
from expandr_jax.ranking.systems import (
    BY_TEXTS,
    System,
    check_stages,
    parse_systems,
    stage_hashes,
)
from expandr_jax.report.pages import write_mean, write_set
from expandr_jax.report.run_report import results_table
from expandr_jax.report.tables import wide_console
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING
from train.launch import define_config, define_workdir, launch


def evaluate_set(
    run: Run, models: LazyModels, name: str, tested: Benchmark, systems: Sequence[System],
    measures: Sequence[str], directory: pathlib.Path, cache: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Writes everything about one set; returns the contents of its results.json.

    Tests compare the systems with the first.

    Raises:
        UserError: The set is malformed, or is not the one that the directory was made with.
    """
    path = directory / "results.json"
    if tested.files.root != directory / "data":  # The harvest is what the workdir's config pins.
        source, place = tested.source(name, "dev"), tested.files.path("")  # Dev chooses weights.
        run.check_source(directory, source, place, tested.unread("dev"))
    names = [system.name for system in systems]
    if path.exists():
        results = run.read_json(path)
        columns = ["system", *measures]
        rows = results.get("rows", [])
        if [row.get("system") for row in rows] == names and all([*r] == columns for r in rows):
            return results
    collection = read_beir(tested.files, store=run.path("work", "documents", name))
    collection = dataclasses.replace(collection, name=name.rpartition("/")[2])
    check_relevant(collection, tested.split)
    made = SetRanker(run, models, collection, tested.split, directory, cache)
    qrels = collection.qrels[tested.split]
    metrics.write_qrels(directory / "qrels.trec", qrels)
    values, recalls, said = {}, [], []
    for system in systems:
        scores = made.ranker.rank(system)
        recalls.append(made.ranker.index_recall(system))
        values[system.name] = metrics.evaluate(scores, qrels, measures)
        said += remarks(system.name, scores, qrels)
    made.release()
    write_jsonl(
        directory / "values.jsonl",
        (
            {"query_id": query, "system": system, **{m: of[m][query] for m in of}}
            for system, of in values.items()
            for query in made.queries
        ),
    )
    write_jsonl(
        directory / "evaluation" / "expansions.jsonl",
        (
            {"query_id": query_id, "split": tested.split, "system": system.name, "sample": sample,
             "query": query, "expansion": text}
            for system in systems if system.strategy
            for (query_id, query), asks in zip(
                made.queries.items(), made.expansions(system).texts, strict=True)
            for sample, text in enumerate(text for texts in asks for text in texts)
        ),
    )  # fmt: skip
    pairs = [(name, names[0]) for name in names[1:]]
    parts = dict.fromkeys(part.name for system in systems for part in system.with_parts())
    counted = made.ranker.answers
    answers = [{"system": name, **counted[name]} for name in parts if name in counted]
    results = summary(collection.name, values, pairs, recalls, said, answers)
    chosen = made.choices.made
    results["chosen"] = {name: as_record(chosen[name]) for name in parts if name in chosen}
    write_set(directory, results, values, made.queries)
    write_json(path, results)
    return results


def _untrained(config: Config, names: Sequence[str]) -> list[System]:
    """The systems of these names; UserError where the config or this program cannot make one."""
    systems = parse_systems(names)
    check_stages(systems, config.evaluation)
    for system in systems:
        if system.needs_training:
            raise UserError(
                f"system {system.name!r} needs a training run; train.joint ranks it, with "
                "evaluation.systems"
            )
        if config.retriever.pooling == SPLADE_POOLING and not system.retrievers <= {*BY_TEXTS}:
            raise UserError(
                f"system {system.name!r} searches by vectors, but retriever.pooling is 'splade'; a "
                "sparse encoder is evaluation.splade.source, and its system splade"
            )
    return systems


def evaluate_beir(
    config: Mapping[str, Any] | Config,
    workdir: str | os.PathLike,
    data: Sequence[str],
    names: Sequence[str],
    split: str,
    console: Console,
    measures: Sequence[str] = (),
    cache: pathlib.Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs or continues the evaluation of systems on sets in a workdir.

    Args:
        config: As from configs/; `evaluation.query_weights` and `evaluation.samples` hold one
            value each, 0 samples being those of a strategy's authors.
        workdir, console: Where files, and progress and tables go.
        data: Paths of the sets; none are the config's own data and tests.
        names: The systems; tests compare with the first.
        split: Whose judgements are used; "": as `find_benchmarks` has it.
        measures: Beside those that every table has.
        cache: Where generated texts are kept, for several workdirs; None: in the workdir.

    Returns:
        Set -> the contents of its results.json.

    Raises:
        UserError: Something the user gave is wrong; what was done so far stays.
    """
    config = read_config(config)
    systems, measures = _untrained(config, names), list(dict.fromkeys((*METRICS, *measures)))
    metrics.evaluate({}, {"": {"": 1}}, measures)  # An unknown one is refused before the work.
    own = config.data
    harvest = not data and own.kind == "pydoc"
    if not data and not harvest:
        data = [path for path in (own.path if own.kind == "beir" else "", *own.tests) if path]
        if own.kind == "beir" and own.url:
            data.insert(0, str(data_path(own, Reporter(console))))
        if not data:
            raise UserError("--data is missing, and the config names no BEIR data: --data=DIR")
    sets = find_benchmarks(data, split)
    with contextlib.closing(Run(workdir, config, console)) as run:
        if harvest:
            with run.phase("data"):
                sets = _harvested_set(run.config.data, split, run.checksums, run.reporter)
        run.check_models(stage_hashes(systems, config.evaluation))
        models = LazyModels(run, any(system.generators for system in systems))
        texts = cache or run.path("work", "texts")
        results = {}
        for name, tested in sets.items():
            directory = run.path(name) if len(sets) > 1 else run.path()
            results[name] = evaluate_set(
                run, models, name, tested, systems, measures, directory, texts
            )
            console.print(results_table(results[name]))
        if len(sets) > 1:
            mean = mean_over_sets(results)
            write_json(run.path("mean.json"), mean)
            console.print(write_mean(run.workdir, mean))
        console.print(run.where(run.path("report.html")), soft_wrap=True)
    return results


def _harvested_set(
    config: DataSettings, split: str, checksums: Checksums, reporter: Reporter
) -> dict[str, Benchmark]:
    """The docstrings that the config names, as `train.joint` has them, in the workdir's data/."""
    data = prepare_data(config, checksums, reporter)
    (harvested,) = find_benchmarks([str(checksums.workdir / "data")], split).values()
    return {data.collection.name: harvested}


def main(_: Any) -> None:
    settings = flags.FLAGS
    if not settings.systems:
        raise UserError("--systems is missing: --systems=bm25,dense, for example, or --systems=all")
    settings.config.evaluation.query_weights = (settings.query_weight,)
    # 0 samples mean something here alone.
    config = with_settings(
        read_config(settings.config), {"evaluation.samples": (settings.samples,)}
    )
    evaluate_beir(
        config,
        settings.workdir,
        settings.data,
        settings.systems,
        settings.split,
        wide_console(),
        settings.measures,
        pathlib.Path(settings.cache) if settings.cache else None,
    )


def define_flags() -> None:
    define_config("configs/beir.py")
    define_workdir()
    flags.DEFINE_list("data", [], "BEIR directories or zips, or folders of several, or BRIGHT's; "
                      "none: the config's own data.")  # fmt: skip
    flags.DEFINE_list("systems", [], "What is compared; the first is what tests compare with.")
    flags.DEFINE_list("measures", [], "Further ones, as ir-measures spells them: P@5,Rprec.")
    flags.DEFINE_string("split", "", "Whose judgements are used; test, and dev of a set called "
                        "msmarco.")  # fmt: skip
    flags.DEFINE_float("query_weight", 0.5, "The query's own, where a strategy weighs it.",
                       lower_bound=0.0, upper_bound=1.0)  # fmt: skip
    flags.DEFINE_integer("samples", 0, "Texts of each request; 0: as a strategy's authors have it.",
                         lower_bound=0)  # fmt: skip
    flags.DEFINE_string("cache", "", "Where generated texts are kept, for several workdirs; the "
                        "workdir's own work/texts.")  # fmt: skip


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
