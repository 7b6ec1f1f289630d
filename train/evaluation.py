"""The end of a run: fresh expansions, settings chosen on dev, every system scored on test."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections
import numpy as np

from expandr_jax import metrics
from expandr_jax.data.beir import read_beir
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.data.records import write_json, write_jsonl
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import journaled, numbered
from expandr_jax.expansion.strategies import strategy
from expandr_jax.metrics import CHOSEN_BY, METRICS
from expandr_jax.pair import Models
from expandr_jax.ranking.dense import Choice, EncodedQueries, choose, dense_run, finish_run
from expandr_jax.ranking.samples import SAMPLE_METRICS, mean_by_query
from expandr_jax.ranking.systems import BM25, EXPANSION, System, parse_systems, row_of_round
from expandr_jax.report.pages import write_mean
from expandr_jax.report.run_report import results_table
from expandr_jax.report.sets import mean_over_sets
from expandr_jax.runtime.run import Run
from expandr_jax.search import build_index
from expandr_jax.vectors.corpus import Corpus, encode_corpus, encode_texts
from train.expansions import run_expander
from train.samples import sample_rows

SPLITS = ("dev", "test")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has trained, by the names that `System` uses.

    Attributes:
        retrievers: Name -> parameters and the corpus as they encode it; made when asked for.
        adapters: Name -> adapter; "base" -> None.
    """

    retrievers: Mapping[str, Callable[[], tuple[Any, Corpus]]]
    adapters: Mapping[str, Any]


def evaluate(
    run: Run,
    models: Models,
    data: TrainingData,
    trained: Trained,
    *,
    set_name: str = "",
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes evaluation/, runs/, qrels.trec and results.json; returns the results.

    Args:
        run: The workdir.
        models: Its models.
        data: Dev and test queries, and the corpus.
        trained: What is scored.
        set_name: Of a further collection, whose files go to tests/NAME; "": the run's own data.
        chosen: System -> how it uses its expansions; None: what is best on the dev queries.
    """
    directory = run.path("tests", set_name) if set_name else run.path()
    path = directory / "results.json"
    files = result_files(set_name)
    if run.seals.intact(*files):
        return json.loads(path.read_text(encoding="utf-8"))
    systems = {system.name: system for system in systems_of_run(run.config)}
    texts = _sample_expansions(run, models, data, trained, systems, set_name)
    with run.phase("evaluation"):
        runs: dict[str, dict[str, dict[str, float]]] = {}
        choices = {name: Choice(**choice) for name, choice in (chosen or {}).items()}
        samples: list[dict[str, Any]] = []
        tried: list[dict[str, Any]] = []
        with run.progress("evaluation: systems", len(systems)) as advance:
            for name, system in systems.items():
                if system.retriever == BM25 and run.processes.is_main:
                    runs[name] = _bm25(run, data)
                    advance(1)
            for retriever, build in trained.retrievers.items():
                mine = {n: s for n, s in systems.items() if s.retriever == retriever}
                if mine:
                    params, corpus = build()
                    encoded = _encode(run, models, data, params, mine, texts)
                    if run.processes.is_main:  # The others only encode.
                        _dense(run, data, corpus, mine, encoded, runs, choices, tried, samples)
                    advance(len(mine))

        def write() -> None:
            metrics.write_qrels(directory / "qrels.trec", data.collection.qrels["test"])
            for name in systems:
                metrics.write_trec(directory / "runs" / f"{name}.trec", runs[name], name)
            if tried:
                write_jsonl(directory / "evaluation" / "choices.jsonl", tried)
            write_jsonl(directory / "evaluation" / "samples.jsonl", samples)
            write_json(path, _results(directory, data, systems, choices, samples))

        run.processes.once(write)
        run.seals.seal(*files)
    return json.loads(path.read_text(encoding="utf-8"))


def result_files(set_name: str) -> list[str]:
    """What `evaluate` writes, from the workdir."""
    names = "results.json", "qrels.trec", "runs", "evaluation"
    return [f"tests/{set_name}/{name}" if set_name else name for name in names]


def evaluate_benchmarks(
    run: Run, models: Models, trained: Trained, chosen: Mapping[str, Mapping[str, Any]]
) -> None:
    """Scores every system on the collections of `data.tests`, which are not trained on.

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
        if run.seals.intact(*result_files(name)):  # Its corpus may take minutes to read.
            results[name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            collection = read_beir(benchmark.files)
            qrels = {"dev": {}, "test": collection.qrels[benchmark.split]}
            data = TrainingData(dataclasses.replace(collection, name=name, qrels=qrels), [], [])
            retrievers = {
                retriever: _on_benchmark(run, models, data, f"{name}/{retriever}", build)
                for retriever, build in trained.retrievers.items()
            }
            here = Trained(retrievers, trained.adapters)
            results[name] = evaluate(run, models, data, here, set_name=name, chosen=chosen)
        run.console.print(results_table(results[name]))
    if len(results) > 1:
        mean = mean_over_sets(results)

        def write() -> None:
            write_json(run.path("tests", "mean.json"), mean)
            run.console.print(write_mean(run.path("tests"), mean))

        run.processes.once(write)


def _on_benchmark(
    run: Run,
    models: Models,
    data: TrainingData,
    name: str,
    build: Callable[[], tuple[Any, Corpus]],
) -> Callable[[], tuple[Any, Corpus]]:
    """A retriever of the run with the collection's corpus instead of the run's own."""

    def built() -> tuple[Any, Corpus]:
        params, _ = build()
        with run.phase(f"encode the corpus, {name}"):
            return params, encode_corpus(run, models, data.collection.corpus, name, params)

    return built


def systems_of_run(config: ml_collections.ConfigDict) -> list[System]:
    """The config's systems, and one for each round but the last.

    Raises:
        UserError: A run cannot make one of them.
    """
    rounds = [row_of_round(round_) for round_ in range(config.rounds - 1)]
    systems = parse_systems(config.evaluation.systems)
    known = {BM25, "zero-shot", "fine-tuned", "expandr", *(row.retriever for row in rounds)}
    for system in systems:
        if not system.retrievers <= known:
            raise UserError(f"evaluation.systems: {system.name} is of a round that is none before "
                            f"the last; rounds is {config.rounds}")  # fmt: skip
        if any(leaf.strategy not in (None, EXPANSION) or leaf.documents for leaf in system.leaves):
            raise UserError(f"evaluation.systems: {system.name} has another strategy than the "
                            "config's; eval.beir compares them")  # fmt: skip
    return list({system.name: system for system in (*systems, *rounds)}.values())


def _sample_expansions(
    run: Run,
    models: Models,
    data: TrainingData,
    trained: Trained,
    systems: Mapping[str, System],
    set_name: str,
) -> dict[str, dict[tuple[str, int], str]]:
    """Generator name -> (query id, sample) -> text; writes evaluation/expansions.jsonl.

    Every generator draws with the same numbers, so that a difference between two is theirs.
    """
    queries = [(split, query) for split in SPLITS for query in data.collection.qrels[split]]
    count = max(run.config.evaluation.samples)
    by_id = {query: data.collection.queries[query] for _, query in queries}
    expander = run_expander(run, models, data, trained.retrievers["expandr"])
    texts = {}
    for name in dict.fromkeys(s.generator for s in systems.values() if s.generator is not None):
        what = f"{set_name}, {name}" if set_name else name
        with run.phase(f"expansions for evaluation, {what} generator"):
            journal = run.path("work", "tests", set_name) if set_name else run.path("work")
            journal /= f"evaluation-{name}.jsonl"
            adapter = trained.adapters[name]
            sample = journaled(expander, adapter, journal, "evaluation")
            texts[name] = numbered(expander.texts(by_id, count, sample))
    rows = (
        {
            "query_id": query,
            "split": split,
            "system": name,
            "sample": sample,
            "query": data.collection.queries[query],
            "expansion": texts[system.generator][query, sample],
        }
        for name, system in systems.items()
        if system.generator is not None
        for split, query in queries
        for sample in range(count * len(expander.strategy.asks))
    )
    directory = run.path("tests", set_name) if set_name else run.path()
    run.processes.once(lambda: write_jsonl(directory / "evaluation" / "expansions.jsonl", rows))
    return texts


def _bm25(run: Run, data: TrainingData) -> dict[str, dict[str, float]]:
    config, corpus = run.config.evaluation, data.collection.corpus
    queries = list(data.collection.qrels["test"])
    index = build_index(list(corpus.values()), "bm25")
    depth = config.depth + config.drop_identical_ids
    scores, indices = index.search(data.queries(queries), depth)
    found = metrics.make_run(queries, list(corpus), scores, indices, above=0.0)
    return finish_run(found, config.depth, config.drop_identical_ids)


def _encode(
    run: Run,
    models: Models,
    data: TrainingData,
    params: Any,
    systems: Mapping[str, System],
    texts: Mapping[str, Mapping[tuple[str, int], str]],
) -> dict[str, dict[str, EncodedQueries]]:
    """System -> split -> queries under one retriever, with the system's expansions if it has any.

    Without dev queries, choices are made already.
    """
    encoded: dict[str, dict[str, EncodedQueries]] = {name: {} for name in systems}
    for split in SPLITS:
        ids = list(data.collection.qrels[split])
        if not ids:
            continue
        plain = encode_texts(run, models, params, data.queries(ids), "query", ids=ids)
        for name, system in systems.items():
            encoded[name][split] = EncodedQueries(ids, plain)
            if system.generator is not None:
                expansions = _encode_expansions(run, models, params, ids, texts[system.generator])
                encoded[name][split] = EncodedQueries(ids, plain, *expansions)
    return encoded


def _dense(
    run: Run,
    data: TrainingData,
    corpus: Corpus,
    systems: Mapping[str, System],
    encodings: Mapping[str, Mapping[str, EncodedQueries]],
    runs: dict[str, dict[str, dict[str, float]]],
    choices: dict[str, Choice],
    tried: list[dict[str, Any]],
    samples: list[dict[str, Any]],
) -> None:
    """Adds of one retriever the test runs, choices not made yet with all tried, and samples."""
    config = run.config.evaluation
    settings = {
        "normalize": run.config.contrastive.normalize,
        "depth": config.depth,
        "drop_identical_ids": config.drop_identical_ids,
    }
    each = len(strategy(run.config.expansion.strategy).asks)  # Texts of a sample.
    grid = [Choice(w, n * each) for n in config.samples for w in config.query_weights]
    qrels = data.collection.qrels
    for name, system in systems.items():
        encoded = encodings[name]
        if system.generator is not None:
            if name not in choices:
                choices[name], values = choose(
                    corpus.index, corpus.ids, encoded["dev"], qrels["dev"], grid, **settings
                )
                tried += [
                    {"system": name, **dataclasses.asdict(choice), CHOSEN_BY: round(value, 6)}
                    for choice, value in values
                ]
                best = max(value for _, value in values)
                run.console.print(
                    f"  {name}: query weight {choices[name].query_weight}, samples "
                    f"{choices[name].samples} (dev nDCG@10 {best:.4f})"
                )
            if system.retriever == "expandr":
                samples += sample_rows(run.config, name, corpus, data, encoded)
        runs[name] = dense_run(
            corpus.index, corpus.ids, encoded["test"], choices.get(name), **settings
        )


def _encode_expansions(
    run: Run, models: Models, params: Any, ids: list[str], texts: Mapping[tuple[str, int], str]
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors [queries, samples, dim] of expansions and which are not empty."""
    count = 1 + max(sample for _, sample in texts)
    flat = [texts[query, sample] for query in ids for sample in range(count)]
    named = [f"expansions of {query}" for query in ids for _ in range(count)]
    vectors = encode_texts(run, models, params, flat, "document", ids=named)
    present = np.array([bool(text) for text in flat])
    return vectors.reshape(len(ids), count, -1), present.reshape(len(ids), count)


def _results(
    directory: pathlib.Path,
    data: TrainingData,
    systems: Mapping[str, System],
    choices: Mapping[str, Choice],
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    qrels = data.collection.qrels["test"]
    # Scored from what is on disk, so that anyone who reads the files finds the same figures.
    scored = {
        name: metrics.evaluate(
            metrics.read_trec(directory / "runs" / f"{name}.trec"), qrels, METRICS
        )
        for name in systems
    }
    rows = [
        {"system": name, **{m: round(metrics.mean(scored[name][m]), 6) for m in METRICS}}
        for name in systems
    ]
    significance = []
    if "expandr" in systems:
        for baseline in systems:
            if baseline == "expandr":
                continue
            for measure in METRICS:
                test = metrics.paired_test(scored["expandr"][measure], scored[baseline][measure])
                significance.append(
                    {"system": "expandr", "baseline": baseline, "metric": measure, **test}
                )
        if "expandr-base-generator" in systems:
            pair = "expandr", "expandr-base-generator"
            for field, measure in SAMPLE_METRICS.items():
                ours, base = (mean_by_query(samples, name, "test", field) for name in pair)
                if ours:
                    significance.append(
                        {
                            "system": pair[0],
                            "baseline": pair[1],
                            "metric": measure,
                            **metrics.paired_test(ours, base),
                        }
                    )
    return {
        "dataset": data.collection.name,
        "queries": len(qrels),
        "chosen": {name: dataclasses.asdict(choice) for name, choice in choices.items()},
        "rows": rows,
        "significance": significance,
    }
