"""A run's systems on the collections of `data.tests`, which are not trained on."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from expandr_jax.data.beir import read_beir
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.data.records import write_json
from expandr_jax.data.training_data import TrainingData
from expandr_jax.pair import Models
from expandr_jax.report.pages import write_mean
from expandr_jax.report.run_report import results_table
from expandr_jax.report.sets import mean_over_sets
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import Corpus
from train.encoding import encode_corpus
from train.evaluation import Trained, evaluate, result_files


def evaluate_benchmarks(
    run: Run, models: Models, trained: Trained, chosen: Mapping[str, Mapping[str, Any]]
) -> None:
    """Scores every system on the collections.

    Writes tests/NAME/ for each, with the files of the run's own results, and tests/mean.json.

    Args:
        run: The workdir.
        models: Its models.
        trained: What is scored.
        chosen: From the results on the run's own data: how each system uses its expansions.
    """
    results = {}
    for name, benchmark in find_benchmarks(run.config.data.tests).items():
        path = run.path("tests", name, "results.json")
        if run.checksums.intact(*result_files(name)):  # Its corpus may take minutes to read.
            results[name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            collection = read_beir(benchmark.files)
            qrels = {"dev": {}, "test": collection.qrels[benchmark.split]}
            data = TrainingData(dataclasses.replace(collection, name=name, qrels=qrels), [], [])
            here = _on_benchmark(run, models, data, trained)
            results[name] = evaluate(run, models, data, here, set_name=name, chosen=chosen)
        run.console.print(results_table(results[name]))
    if len(results) > 1:
        mean = mean_over_sets(results)

        def write() -> None:
            write_json(run.path("tests", "mean.json"), mean)
            run.console.print(write_mean(run.path("tests"), mean))

        run.processes.once(write)


def _on_benchmark(run: Run, models: Models, data: TrainingData, trained: Trained) -> Trained:
    """The run's retrievers with a collection's corpus instead of the run's own."""

    @functools.lru_cache(maxsize=1)  # One is in memory at a time.
    def build(retriever: str) -> tuple[Any, Corpus]:
        params, _ = trained.retrievers[retriever]()
        name = f"{data.collection.name}/{retriever}"
        return params, encode_corpus(run, models, data.collection.corpus, name, params)

    names = trained.retrievers
    return Trained({name: functools.partial(build, name) for name in names}, trained.adapters)
