"""The end of a run: fresh expansions, settings chosen on dev, every system scored on test.

The same systems are scored on the collections of `data.tests`, which are not trained on."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.config import Config
from expandr_jax.data.beir import read_beir
from expandr_jax.data.benchmarks import check_relevant, find_benchmarks
from expandr_jax.data.documents import texts_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json, write_jsonl
from expandr_jax.loading import sparse_corpus
from expandr_jax.metrics import METRICS, RunScores
from expandr_jax.pair import Models
from expandr_jax.ranking.choices import (
    Chosen,
    DevChoices,
    as_record,
    expansion_grid,
    stage_grid,
)
from expandr_jax.ranking.gate import Gate, write_gates
from expandr_jax.ranking.gate_features import GATES
from expandr_jax.ranking.listwise import ListRanker, list_ranker
from expandr_jax.ranking.ranker import Expansions, Ranker, Searches
from expandr_jax.ranking.results import (
    Values,
    compared,
    hardest,
    mean_over_sets,
    of_some,
    paired,
    remarks,
    summary,
)
from expandr_jax.ranking.samples import SAMPLE_METRICS, mean_by_query
from expandr_jax.ranking.systems import (
    ALL_LABELS,
    BM25,
    BY_TEXTS,
    CONTROL,
    DISTILLED,
    EXPANSION,
    FIGRET,
    FIGRET_CONTROL,
    OURS,
    QUERY_TOWERS,
    TURNS,
    System,
    check_stages,
    counterparts,
    parse_system,
    parse_systems,
    row_of_round,
)
from expandr_jax.report.pages import write_mean
from expandr_jax.report.run_report import results_table
from expandr_jax.rewards.samples import sample_rows
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.run import Run
from expandr_jax.search import Index
from expandr_jax.vectors.corpus import CorpusRetriever
from train.encoding import run_retriever, run_words
from train.expansions import SPLITS, evaluation_expansions, run_expander
from train.gated import gate_of, gated_rows
from train.kept import Kept, kept_results, read_chosen


def evaluate(
    run: Run,
    models: Models,
    data: TrainingData,
    retrievers: Mapping[str, CorpusRetriever],
    adapters: Mapping[str, Any],
    *,
    folder: str = "",
    chosen: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Writes evaluation/, runs/, qrels.trec and results.json; returns the results.

    Args:
        run, models, data: Whose dev and test queries are scored.
        retrievers: Name, as `System` has it -> retriever, with the run's own corpus.
        adapters: Name -> adapter; "base" -> None.
        folder: Where in the workdir: "tests/NAME" for a further collection; "": the run's own.
        chosen: System -> what the run's own results.json has chosen for it; None: what is best on
            the dev queries.
    """
    directory = run.path(folder)
    path = directory / "results.json"
    systems, files, kept = systems_of_run(run.config), result_files(folder), Kept()
    if run.checksums.intact(*files):
        results = run.read_json(path)
        if are_of(results, systems):
            return results
        kept = kept_results(run, folder, results, systems)
        run.checksums.forget(*files)  # Half of the new ones are no damage.
    corpus = data.collection.corpus
    words = run_words(run, corpus, folder)
    sparse = functools.cache(
        lambda _: sparse_corpus(
            run.config, texts_of(corpus), run.path("work", folder), run.reporter
        )
    )
    open_now: list[CorpusRetriever] = []

    def let_go() -> None:
        while open_now:
            open_now.pop().release()

    @functools.lru_cache(maxsize=1)  # One's vectors of a further collection are in memory.
    def retriever(name: str) -> CorpusRetriever:
        let_go()  # One index is in memory, not those of all.
        whose = OURS if name in QUERY_TOWERS else name  # The documents that are searched.
        found = retrievers[whose]
        if folder:
            where = f"{data.collection.name}/{whose}"
            found = run_retriever(run, models, corpus, found.params, where)
        if whose != name:
            found = dataclasses.replace(found, params=retrievers[name].params, documents=found)
        _ = found.corpus  # All processes encode it together.
        open_now.append(found)
        return found

    def timed(system: System) -> contextlib.AbstractContextManager:
        count = len(data.collection.qrels["test"])
        return contextlib.nullcontext() if folder else run.search(system.name, count)

    expander = run_expander(run, models, data, words, lambda *asked: retriever(OURS).find(*asked))
    expansions = evaluation_expansions(run, data, expander, adapters, systems, folder)

    @functools.cache
    def lists() -> ListRanker:  # Process 0 alone ranks.
        alone = dataclasses.replace(expander.sampler, processes=Processes())
        return list_ranker(alone, run.config.evaluation.listwise, run.path("work", "texts"))

    with run.phase("evaluation"):
        samples, recalls, runs = kept.samples, kept.recalls, dict(kept.runs)
        gated, gates, answers = kept.gated, kept.gates, dict(kept.answers)
        given = read_chosen(run, chosen or {})
        choices = DevChoices(
            lambda: rankers["dev"],
            data.collection.qrels["dev"],
            lambda system: _tried(run.config, system, data, expansions),
            made=given or kept.choices,
            tried=kept.tried,
            say=run.reporter.say,
            is_main=run.processes.is_main,
        )
        rankers = _rankers(
            run, data, retriever, words, sparse, expansions, choices, kept.runs, timed, lists
        )
        # Those of one retriever after the other, each when all that it rests on is there.
        order = [*BY_TEXTS, *retrievers]
        parts = {part.name: part for system in systems for part in system.with_parts()}
        ranked = sorted(parts.values(), key=lambda s: max(map(order.index, s.retrievers)))
        place = {system.name: number for number, system in enumerate(ranked)}
        new = [s for s in systems if s.name not in kept.runs]
        left = {part.name: part for s in new for part in s.with_parts()}
        # Each on dev, too, where it is a part of what is chosen there: a retriever is there once.
        weighed = [system for system in left.values() if choices.needs(system)]
        on_dev = {p.name for s in weighed for part in s.parts for p in part.with_parts()}
        left = (left.keys() - kept.runs.keys()) | on_dev
        ranked = [s for s in ranked if s.name in left]
        with run.reporter.progress("evaluation: systems", len(ranked)) as advance:
            for system in ranked:
                if system.name in on_dev:
                    rankers["dev"].rank(system)
                if system.name in kept.runs:
                    advance(1)
                    continue
                runs[system.name] = rankers["test"].rank(system)
                if recall := rankers["test"].index_recall(system):
                    recalls[system.name] = recall
                if counted := rankers["test"].answers.get(system.name):
                    answers[system.name] = {"system": system.name, **counted}
                if system.stage in GATES and run.processes.is_main:
                    rows = gated_rows(system, rankers["test"], choices)
                    gated = [row for row in gated if row["system"] != system.name] + rows
                    gates[system.name] = gate_of(system, rows, runs, data.collection.qrels["test"])
                if system.retriever == OURS and system.strategy == EXPANSION:
                    encoded = {split: r.encoded(system) for split, r in rankers.items() if r.ids}
                    if run.processes.is_main:
                        here, name = retriever(OURS).corpus, system.name
                        samples = [row for row in samples if row["system"] != name]
                        sections = run.config.reward, run.config.evaluation
                        samples += sample_rows(name, here, data, encoded, *sections)
                advance(1)
        told_alone = bool(run.config.figret.rank)
        by_words = rankers["test"].rank(parse_system(BM25)) if told_alone else {}

        def write() -> None:
            qrels, said = data.collection.qrels["test"], []
            metrics.write_qrels(directory / "qrels.trec", qrels)
            for system in systems:
                name = system.name
                metrics.write_trec(directory / "runs" / f"{name}.trec", runs[name], name)
                said.extend(remarks(name, runs[name], qrels))
            tried = choices.tried
            for rows in (tried, samples, gated):  # What was kept is as if it had been made now.
                rows.sort(key=lambda row: place[row["system"]])
            if tried:
                write_jsonl(directory / "evaluation" / "choices.jsonl", tried)
            write_jsonl(directory / "evaluation" / "samples.jsonl", samples)
            if gated:
                write_jsonl(directory / "evaluation" / "gated.jsonl", gated)
            fitted = {n: c for n, c in choices.made.items() if isinstance(c, Gate)}
            if fitted and not folder:
                write_gates(directory / "evaluation" / "gates.json", fitted)
            values = {s.name: metrics.evaluate(runs[s.name], qrels, METRICS) for s in systems}
            # Those of the run's own leaves; a further collection has all that it was given.
            made = choices.made
            used = made if chosen else {name: made[name] for name in place if name in made}
            told = [recalls[name] for name in place if name in recalls]
            asked = [answers[name] for name in place if name in answers]
            if hard := hardest(by_words, qrels) if told_alone else {}:
                rows = ({"query_id": query, "bm25_rank": rank} for query, rank in hard.items())
                write_jsonl(directory / "evaluation" / "hardest.jsonl", rows)
            name = data.collection.name
            results = _results(name, values, systems, used, samples, told, said, asked, hard)
            if gates:
                results["gates"] = [gates[name] for name in place if name in gates]
            write_json(path, results)

        run.processes.once(write)
        let_go()
        run.checksums.record(*files)
    return run.read_json(path)


def result_files(folder: str) -> list[str]:
    """What `evaluate` writes, from the workdir."""
    names = "results.json", "qrels.trec", "runs", "evaluation"
    return [f"{folder}/{name}" if folder else name for name in names]


def are_of(results: Mapping[str, Any], systems: Sequence[System]) -> bool:
    """Whether these are the systems of a results.json."""
    return [row["system"] for row in results["rows"]] == [system.name for system in systems]


def systems_of_run(config: Config) -> list[System]:
    """The config's systems, and one for each query tower, last turn, and round but the last.

    Raises:
        UserError: A run cannot make one of them.
    """
    rounds = [row_of_round(round_) for round_ in range(config.rounds - 1)]
    turns = TURNS if config.figret.rank else ()
    towers = [parse_system(name) for name in (*towers_of(config), *turns)]
    systems = parse_systems(config.evaluation.systems)
    known = {*BY_TEXTS, "zero-shot", "fine-tuned", ALL_LABELS, "expandr"}
    known |= {row.retriever for row in (*rounds, *towers)}
    for system in systems:
        if lacking := system.retrievers & {*QUERY_TOWERS, *TURNS} - known:
            setting = "distill.control" if config.distill.epochs else "distill.epochs"
            setting = "figret.rank" if min(lacking) in TURNS else setting
            raise UserError(f"evaluation.systems: {system.name} rests on {min(lacking)}, which "
                            f"there is with {setting} alone")  # fmt: skip
        if not system.retrievers <= known:
            raise UserError(f"evaluation.systems: {system.name} is of a round that is none before "
                            f"the last; rounds is {config.rounds}")  # fmt: skip
        if any(leaf.documents for leaf in system.leaves):
            raise UserError(f"evaluation.systems: {system.name} has documents expanded, which "
                            "eval.beir alone does")  # fmt: skip
    check_stages(systems, config.evaluation)
    return list({system.name: system for system in (*systems, *towers, *rounds)}.values())


def towers_of(config: Config) -> tuple[str, ...]:
    """The query towers that a run distills, by their rows."""
    both = (DISTILLED, CONTROL) if config.distill.control else (DISTILLED,)
    return both if config.distill.epochs else ()


def _rankers(
    run: Run,
    data: TrainingData,
    retriever: Callable[[str], CorpusRetriever],
    words: Callable[[], Index],
    sparse: Callable[[str | None], Any],
    expansions: Mapping[tuple[str, str, str], Expansions],
    choices: DevChoices,
    runs: Mapping[str, RunScores],
    timed: Callable[[System], contextlib.AbstractContextManager],
    lists: Callable[[], ListRanker],
) -> dict[str, Ranker]:
    """A ranker of each split; `runs` are those of test that there are already.

    Searches for test are within `timed`.
    """

    def ranker(split: str) -> Ranker:
        return Ranker(
            {query: data.collection.queries[query] for query in data.collection.qrels[split]},
            Searches(
                lambda _: words(), lambda name, _: retriever(name), data.collection.corpus, sparse
            ),
            lambda leaf: expansions[split, leaf.generator, leaf.strategy],
            choices,
            run.config.evaluation,
            runs=runs if split == "test" else {},
            timed=timed if split == "test" else contextlib.nullcontext,
            is_main=run.processes.is_main,
            excluded=data.collection.excluded,
            lists=lists,
        )

    return {split: ranker(split) for split in SPLITS}


def _tried(
    config: Config,
    system: System,
    data: TrainingData,
    expansions: Mapping[tuple[str, str, str], Expansions],
) -> list[Chosen]:
    """What is tried for a system on the dev queries; nothing where a fusion's parts weigh alike."""
    settings = config.evaluation
    if system.parts:
        return stage_grid(system, settings) if data.collection.qrels["dev"] else []
    asks = len(expansions["dev", system.generator, system.strategy].strategy.asks)
    return expansion_grid(settings, config.expansion.combine, asks)


def _results(
    name: str,
    values: Values,
    systems: Sequence[System],
    choices: Mapping[str, Chosen],
    samples: Sequence[Mapping[str, Any]],
    recalls: Sequence[Mapping[str, Any] | None],
    said: Sequence[str],
    answers: Sequence[Mapping[str, Any]],
    hard: Collection[str],
) -> dict[str, Any]:
    """The contents of results.json."""
    against = [(OURS, other) for other in values if other != OURS] if OURS in values else []
    results = summary(name, values, against, recalls, said, answers)
    tests = results["significance"]
    pair = OURS, f"{OURS}-base-generator"
    if pair in against:
        for field, metric in SAMPLE_METRICS.items():
            ours, base = (mean_by_query(samples, system, "test", field) for system in pair)
            if ours:
                tests.append(paired(*pair, metric, ours, base))
    plain = f"{OURS}-plain"
    learned = [(DISTILLED, plain), (DISTILLED, CONTROL), (FIGRET, plain), (FIGRET, FIGRET_CONTROL)]
    learned = [pair for pair in learned if values.keys() >= {*pair}]
    tests += compared(values, [*counterparts(systems), *learned])
    if hard:
        results["hardest"] = of_some(values, hard, [*against, *learned])
    return results | {"chosen": {name: as_record(chosen) for name, chosen in choices.items()}}


def evaluate_benchmarks(
    run: Run,
    models: Models,
    retrievers: Mapping[str, CorpusRetriever],
    adapters: Mapping[str, Any],
    chosen: Mapping[str, Mapping[str, Any]],
) -> None:
    """Scores every system on the collections, using expansions as was `chosen` on the run's data.

    Writes tests/NAME/ for each, with the files of the run's own results, and tests/mean.json.
    """
    results, systems = {}, systems_of_run(run.config)
    for name, benchmark in find_benchmarks(run.config.data.tests).items():
        folder = f"tests/{name}"
        if run.checksums.intact(*result_files(folder)):
            results[name] = run.read_json(run.path(folder, "results.json"))
        if name not in results or not are_of(results[name], systems):
            # Not before: its corpus may take minutes to read.
            store = run.path("work", "documents", "tests", name)
            collection = run.processes.main_first(
                functools.partial(read_beir, benchmark.files, store=store)
            )
            check_relevant(collection, benchmark.split)
            qrels = {"dev": {}, "test": collection.qrels[benchmark.split]}
            data = TrainingData(dataclasses.replace(collection, name=name, qrels=qrels), [], [])
            results[name] = evaluate(
                run, models, data, retrievers, adapters, folder=folder, chosen=chosen
            )
        run.console.print(results_table(results[name]))
    if len(results) > 1:
        mean = mean_over_sets(results)

        def write() -> None:
            write_json(run.path("tests", "mean.json"), mean)
            run.console.print(write_mean(run.path("tests"), mean))

        run.processes.once(write)
