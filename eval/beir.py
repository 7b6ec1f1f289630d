"""One table over data sets: `python -m eval.beir --data=DIR[,DIR] --systems=a,b --workdir=OUT`.

Systems are `bm25`, `dense` (the config's retriever), either with a strategy of eval/strategies.py
(`dense+q2d`, `bm25+query2doc`), `dense+prf-average`, `dense+prf-rocchio`, the same over a corpus
whose documents are expanded (`bm25@d2q`, `dense@d2d+q2d`), and fusions of any of these
(`rrf:bm25:dense`). Each set gets results.json, runs/ and qrels.trec, in OUT or, where there
are several, in OUT/NAME. The same command goes on where it stopped; with other systems it adds what
is missing, and what was generated serves every system that asks for the same.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from eval.compare import render, wide_console
from eval.ranking import LazyModels, Ranker
from eval.strategies import System, parse_system
from eval.systems import MEASURES
from expandr_jax import metrics
from expandr_jax.data.archive import Files
from expandr_jax.data.beir import find_collections, judgements, source_hashes
from expandr_jax.data.records import write_json, write_jsonl
from expandr_jax.errors import UserError
from expandr_jax.report import results_table
from train.launch import define_config, define_workdir, launch
from train.run import Run


def evaluate_set(
    run: Run,
    models: LazyModels,
    files: Files,
    systems: Sequence[System],
    split: str,
    directory: pathlib.Path,
) -> dict[str, Any]:
    """Writes one set's runs/, qrels.trec, evaluation/ and results.json; returns the results.

    Raises:
        UserError: The set is malformed, or is not the one that the directory was made with.
    """
    path, source_path = directory / "results.json", directory / "data" / "SOURCE.json"
    source = {"name": files.path("").name, "split": split, "files": source_hashes(files)}
    if not source_path.exists():
        write_json(source_path, source)
    elif json.loads(source_path.read_text(encoding="utf-8")) != source:
        raise UserError(f"{directory}: was made with other data than {files.path('')}; "
                        "use a new --workdir")  # fmt: skip
    names = [system.name for system in systems]
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        if [row["system"] for row in results["rows"]] == names:
            return results
    ranker = Ranker(run, models, files, split, directory)
    metrics.write_qrels(directory / "qrels.trec", ranker.qrels)
    values = {s.name: metrics.evaluate(ranker.rank(s), ranker.qrels, MEASURES) for s in systems}
    write_jsonl(
        directory / "evaluation" / "expansions.jsonl",
        (
            {"query_id": query_id, "split": split, "system": system.name, "sample": sample,
             "query": query, "expansion": text}
            for system in systems if system.strategy
            for query_id, query, texts in zip(
                ranker.ids, ranker.queries, ranker.texts(system.method), strict=True)
            for sample, text in enumerate(texts)
        ),
    )  # fmt: skip
    results = {
        "dataset": ranker.collection.name,
        "queries": len(ranker.qrels),
        "chosen": {},
        "rows": [
            {"system": name, **{m: round(metrics.mean(values[name][m]), 6) for m in MEASURES}}
            for name in names
        ],
        "significance": [
            {"system": name, "baseline": names[0], "metric": measure,
             **metrics.paired_test(values[name][measure], values[names[0]][measure])}
            for name in names[1:]
            for measure in MEASURES
        ],
    }  # fmt: skip
    write_json(path, results)
    return results


def mean_over_sets(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sets, where sets named "cqadupstack/android" and so on count as one together.

    Returns:
        "sets": name -> rows as in results.json; "rows": their means.
    """
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition("/")[0], []).append(result["rows"])
    sets = {name: _mean_rows(several) for name, several in groups.items()}
    return {"sets": sets, "rows": _mean_rows(list(sets.values()))}


def _mean_rows(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {
            "system": rows[0]["system"],
            **{m: round(float(np.mean([row[m] for row in rows])), 6) for m in MEASURES},
        }
        for rows in zip(*tables, strict=True)
    ]


def find_sets(paths: Sequence[str], split: str) -> dict[str, Files]:
    """The sets at some paths by name, each with judgements of the split.

    Raises:
        UserError: There is none at a path, it lacks the split, or two have the same name.
    """
    sets: dict[str, Files] = {}
    for path in paths:
        for name, files in find_collections(path).items():
            if name in sets:
                raise UserError(f"{path}: a second data set called {name!r}; rename one")
            next(judgements(files, split, lambda _: None), None)
            sets[name] = files
    return sets


def evaluate_beir(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path,
    data: Sequence[str],
    names: Sequence[str],
    split: str,
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Runs or continues the evaluation of systems on sets in a workdir.

    Args:
        config: As from configs/; `evaluation.query_weights` and `evaluation.samples` hold one
            value each, 0 samples being those of a strategy's authors.
        workdir: Where everything goes.
        data: Paths of the sets.
        names: The systems; tests compare with the first.
        split: Whose judgements are used.
        console: Where progress and tables go.

    Returns:
        Set -> the contents of its results.json.

    Raises:
        UserError: Something the user gave is wrong; what was done so far stays.
    """
    systems = list({name: parse_system(name) for name in names}.values())
    sets = find_sets(data, split)
    run = Run(workdir, config, console)
    parts = [part for system in systems for part in system.with_parts()]
    models = LazyModels(run, any(part.strategy or part.documents for part in parts))
    results = {}
    for name, files in sets.items():
        directory = run.path(name) if len(sets) > 1 else run.path()
        results[name] = evaluate_set(run, models, files, systems, split, directory)
        console.print(results_table(results[name]))
    if len(sets) > 1:
        mean = mean_over_sets(results)
        write_json(run.path("mean.json"), mean)
        console.print(mean_table(mean))
    run.close()
    return results


def mean_table(mean: Mapping[str, Any]) -> Table | str:
    """nDCG@10 by set, and its mean."""
    columns = [*mean["sets"].values(), mean["rows"]]
    rows = [
        [cells[0]["system"], *(f"{cell[MEASURES[0]]:.4f}" for cell in cells)]
        for cells in zip(*columns, strict=True)
    ]
    title = f"{MEASURES[0]} over {len(mean['sets'])} sets"
    return render(title, ["system", *mean["sets"], "mean"], rows, "text")


def main(_: Any) -> None:
    settings = flags.FLAGS
    if not settings.data or not settings.systems:
        raise UserError("--data or --systems is missing: --data=DIR --systems=bm25,dense")
    config = settings.config
    config.evaluation.query_weights = (settings.query_weight,)
    config.evaluation.samples = (settings.samples,)
    workdir = pathlib.Path(settings.workdir)
    evaluate_beir(config, workdir, settings.data, settings.systems, settings.split, wide_console())


def define_flags() -> None:
    define_config("configs/beir.py")
    define_workdir()
    flags.DEFINE_list("data", [], "BEIR directories or zips, or folders of several.")
    flags.DEFINE_list("systems", [], "What is compared; the first is what tests compare with.")
    flags.DEFINE_string("split", "test", "Whose judgements are used; dev on MS MARCO.")
    flags.DEFINE_float("query_weight", 0.5, "Of the query's vector, where a strategy weighs it.",
                       lower_bound=0.0, upper_bound=1.0)  # fmt: skip
    flags.DEFINE_integer("samples", 0, "Texts of each request; 0: as a strategy's authors have it.",
                         lower_bound=0)  # fmt: skip


if __name__ == "__main__":
    launch(main, define_flags)
