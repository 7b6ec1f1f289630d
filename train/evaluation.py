"""The end of a run: fresh expansions, settings chosen on dev, every system scored on test.

The same systems are scored on the collections of `data.tests`, which are not trained on."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.config import Config
from expandr_jax.data.benchmarks import check_relevant, find_benchmarks
from expandr_jax.data.collect import check_common, read_stored
from expandr_jax.data.documents import texts_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json, write_jsonl
from expandr_jax.loading import sparse_corpus
from expandr_jax.metrics import RunScores
from expandr_jax.pair import Models
from expandr_jax.ranking.choices import Chosen, DevChoices, expansion_grid, stage_grid
from expandr_jax.ranking.evaluated import Evaluated, Evaluation
from expandr_jax.ranking.gate import Gate, write_gates
from expandr_jax.ranking.listwise import ListRanker, list_ranker
from expandr_jax.ranking.ranker import Ranker
from expandr_jax.ranking.results import hardest, mean_over_sets
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.ranking.sources import Expansions, OneAtATime, Searches
from expandr_jax.ranking.systems import (
    ALL_LABELS,
    BM25,
    BY_TEXTS,
    DISTILLED,
    DISTILLED_CONTROL,
    OURS,
    QUERY_TOWERS,
    TURNS,
    System,
    check_stages,
    parse_system,
    parse_systems,
    row_of_round,
)
from expandr_jax.report.pages import write_mean
from expandr_jax.report.run_report import results_table
from expandr_jax.rewards.samples import sample_rows
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever
from train.encoding import run_retriever, run_words
from train.expansions import evaluation_expansions, run_expander
from train.kept import kept_results, read_chosen


def evaluate_systems(
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
    directory, systems, files = run.path(folder), systems_of_run(run.config), result_files(folder)
    gates, found = run.path("evaluation", "gates.json"), Evaluated()
    if run.checksums.intact(*files):
        results = run.read_json(directory / "results.json")
        if are_of(results, systems):
            return results
        before = read_chosen(gates, results["chosen"])
        of_run = run.config.rounds, before, run.processes.is_main
        found = kept_results(directory, results, systems, *of_run)
        run.checksums.forget(*files)  # Half of the new ones are no damage.
    corpus = data.collection.corpus
    words = run_words(run, corpus, folder)
    elsewhere = functools.partial(run_retriever, run, models, corpus) if folder else None
    dense = OneAtATime(retrievers, elsewhere, data.collection.name)
    expander = run_expander(run, models, data, words, lambda *asked: dense(OURS).find(*asked))
    written = evaluation_expansions(run, data, expander, adapters, systems, folder)
    sparse = functools.cache(
        lambda _: sparse_corpus(
            run.config, texts_of(corpus), run.path("work", folder), run.reporter
        )
    )
    searches = Searches(lambda _: words(), lambda name, _: dense(name), corpus, sparse)

    @functools.cache
    def lists() -> ListRanker:  # Process 0 alone ranks.
        alone = dataclasses.replace(expander.sampler, processes=Processes())
        return list_ranker(alone, run.config.evaluation.listwise, run.path("work", "texts"))

    def timed(system: System) -> contextlib.AbstractContextManager:
        count = len(data.collection.qrels["test"])
        return contextlib.nullcontext() if folder else run.search(system.name, count)

    main, say, settings = run.processes.is_main, run.reporter.say, run.config.evaluation
    combine = run.config.expansion.combine
    sources = Sources(data, searches, written, lists, settings, combine, main, say)
    with run.phase("evaluation"):
        choices = DevChoices(
            lambda: rankers["dev"],
            data.collection.qrels["dev"],
            sources.tried,
            made=read_chosen(gates, chosen or {}) or found.choices,
            tried=found.tried,
            say=say,
            is_main=main,
        )
        rankers = {
            "dev": sources.ranker("dev", choices),
            "test": sources.ranker("test", choices, runs=found.runs, timed=timed),
        }
        evaluation = Evaluation(
            systems,
            [*retrievers],
            rankers,
            choices,
            data.collection.qrels["test"],
            found,
            lambda system, encoded: sample_rows(
                system.name, dense(OURS).corpus, data, encoded, run.config.reward, settings
            ),
            main,
        )
        with run.reporter.progress("evaluation: systems", len(evaluation.left)) as advance:
            for system in evaluation.left:
                evaluation.rank(system)
                advance(1)
        # The hardest queries are told of alone where a turn was for those that fail.
        by_words = rankers["test"].rank(parse_system(BM25)) if run.config.figret.rank else None
        name, given = data.collection.name, bool(chosen)
        run.processes.once(lambda: _write(directory, name, evaluation, by_words, given))
        dense.release()
        words.release()
        run.checksums.record(*files)
    return run.read_json(directory / "results.json")


@dataclasses.dataclass(frozen=True)
class Sources:
    """What systems are ranked by.

    Attributes:
        data: Has the queries and their judgements.
        searches: The corpus.
        written: (split, generator, strategy) -> what was written for the split's queries.
        lists: What ranks lists again; process 0 calls it.
        settings: The config's section `evaluation`.
        combine: How a query's texts count together: `expansion.combine`.
        is_main: Whether this is process 0.
        say: Tells the user something.
    """

    data: TrainingData
    searches: Searches
    written: Mapping[tuple[str, str, str], Expansions]
    lists: Callable[[], ListRanker]
    settings: EvaluationSettings
    combine: str
    is_main: bool
    say: Callable[[str], None]

    def ranker(self, split: str, choices: DevChoices, **options: Any) -> Ranker:
        """A ranker of a split; options are those that splits differ by."""
        collection = self.data.collection
        return Ranker(
            {query: collection.queries[query] for query in collection.qrels[split]},
            self.searches,
            lambda leaf: self.written[split, leaf.generator, leaf.strategy],
            choices,
            self.settings,
            is_main=self.is_main,
            excluded=collection.excluded,
            lists=self.lists,
            say=self.say,
            **options,
        )

    def tried(self, system: System) -> list[Chosen]:
        """What is tried for a system on dev; nothing where a fusion's parts weigh alike."""
        if system.parts:
            return stage_grid(system, self.settings) if self.data.collection.qrels["dev"] else []
        strategy = self.written["dev", system.generator, system.strategy].strategy
        return expansion_grid(self.settings, self.combine, len(strategy.asks))


def _write(
    directory: pathlib.Path,
    name: str,
    evaluation: Evaluation,
    by_words: RunScores | None,
    given: bool,
) -> None:
    """Writes what an evaluation found of a collection.

    Args:
        directory: Where it goes.
        name: The collection's.
        evaluation: When all is ranked.
        by_words: BM25's run, by which queries are hard; None: they are not told of alone.
        given: Whether it was given what to use, as a further collection is: all of that is told.
    """
    qrels = evaluation.qrels
    metrics.write_qrels(directory / "qrels.trec", qrels)
    for row in (system.name for system in evaluation.systems):
        runs = evaluation.found.runs
        metrics.write_trec(directory / "runs" / f"{row}.trec", runs[row], row)
    for file, rows in evaluation.rows().items():
        if rows or file == "samples":
            write_jsonl(directory / "evaluation" / f"{file}.jsonl", rows)
    fitted = {n: c for n, c in evaluation.choices.made.items() if isinstance(c, Gate)}
    if fitted and not given:
        write_gates(directory / "evaluation" / "gates.json", fitted)
    if hard := {} if by_words is None else hardest(by_words, qrels):
        rows = [{"query_id": query, "bm25_rank": rank} for query, rank in hard.items()]
        write_jsonl(directory / "evaluation" / "hardest.jsonl", rows)
    results = evaluation.results(name, all_chosen=given, hard=hard)
    write_json(directory / "results.json", results)


def result_files(folder: str) -> list[str]:
    """What `evaluate_systems` writes, from the workdir."""
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
    both = (DISTILLED, DISTILLED_CONTROL) if config.distill.control else (DISTILLED,)
    return both if config.distill.epochs else ()


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
            known = run.processes.of_files(functools.partial(benchmark.source, name))
            place = benchmark.files.path("")
            run.check_source(run.path(folder), known, place, benchmark.unread())
            store = run.path("work", "documents", "tests", name)
            collection = read_stored(benchmark.files, store, run.processes)
            check_relevant(collection, benchmark.split)
            qrels = {"dev": {}, "test": collection.qrels[benchmark.split]}
            collection = dataclasses.replace(collection, name=name, qrels=qrels)
            check_common(collection, place, run.processes)
            data = TrainingData(collection, [], [])
            results[name] = evaluate_systems(
                run, models, data, retrievers, adapters, folder=folder, chosen=chosen
            )
        run.console.print(results_table(results[name]))
    if len(results) > 1:
        mean = mean_over_sets(results)

        def write() -> None:
            write_json(run.path("tests", "mean.json"), mean)
            run.console.print(write_mean(run.path("tests"), mean))

        run.processes.once(write)
