"""ExpandR from beginning to end: `python -m train.joint --config=configs/X.py --workdir=DIR`.

One round: expand the training queries with the current generator; train the retriever on them
(step A); encode the corpus and rebuild the index; sample candidates, reward them and train the
generator by DPO, or on-policy (step B). Then distill a query tower and learn queries that the
retriever fails, where the config asks for it, choose settings on dev, score every system on test,
export, report. The same command again continues where it stopped.
"""

import collections
import functools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.beir import corpus_key
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.data.collect import check_added_tests, prepare_data
from expandr_jax.data.documents import sealed_key
from expandr_jax.data.training_data import TrainingData
from expandr_jax.data.triples import MadeTriples, Triple
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander
from expandr_jax.expansion.written_queries import generated_queries
from expandr_jax.files.records import write_json
from expandr_jax.loading import load_models
from expandr_jax.objectives.contrastive_checks import check_contrastive_batch
from expandr_jax.objectives.negatives import check_negatives
from expandr_jax.objectives.policy_checks import check_policy
from expandr_jax.pair import Models, check_meshes, model_hashes
from expandr_jax.ranking.systems import (
    ALL_LABELS,
    DISTILLED,
    FIGRET,
    System,
    check_prompts,
    stage_hashes,
)
from expandr_jax.report.run_report import results_table, write_report
from expandr_jax.rewards.registry import check_answers
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.runtime.run import Run
from expandr_jax.training.setup import check_batch_size, count_updates
from expandr_jax.vectors.corpus import CorpusRetriever
from train.demonstrations import with_demonstrations
from train.distilled import GENERATED, check_distillation, make_towers
from train.encoding import run_retriever, run_words
from train.evaluation import (
    are_of,
    evaluate_benchmarks,
    evaluate_systems,
    result_files,
    systems_of_run,
)
from train.expansions import run_expander, training_expansions
from train.export import export_run, exports_of
from train.figret import figret
from train.generator import read_rows, train_generator
from train.launch import launch_training
from train.negatives import training_negatives
from train.policy import has_begun, train_policy
from train.preferences import make_preferences, run_functions
from train.retriever import train_retriever
from train.scores import RewardTools
from train.warm_start import warm_start


def train_joint(
    config: Mapping[str, Any] | Config, workdir: str | os.PathLike, console: Console
) -> dict[str, Any]:
    """Runs or continues the whole of ExpandR in a workdir.

    Args:
        config: As from configs/.
        workdir: Where everything goes, a directory or gs://BUCKET/DIRECTORY; see the file contract
            in docs/run.md.
        console: Where progress is shown.

    Returns:
        The contents of results.json.

    Raises:
        UserError: Something the user gave is wrong; what was done so far stays.
    """
    config = read_config(config)
    check_meshes(config.mesh)
    systems = systems_of_run(config)
    _check_server(config, systems)
    run = Run(workdir, config, console, _grow)
    config = run.config
    if (results := _results_if_done(run)) is not None:
        run.reporter.say("all is done: no model is loaded")
        return _end(run, results)
    functions = run_functions(run, used=has_begun(run.workdir))
    with run.phase("data"):
        data = prepare_data(config.data, run.checksums, run.reporter)
        _note_tests(run)
    qrels = data.collection.qrels
    run.reporter.say(
        f"{len(data.collection.corpus)} documents; queries: {len(data.retriever_train)} train "
        f"the retriever, {len(data.generator_train)} the generator, {len(qrels['dev'])} dev, "
        f"{len(qrels['test'])} test"
    )
    check_negatives(config.contrastive.negatives, config.mining, data)
    check_answers(config.reward, data)
    with run.phase("models"), run.reporter.progress("models loaded", 2) as advance:
        models = load_models(config, advance, trains_retriever=True)
    run.check_models(model_hashes(models) | stage_hashes(systems, config.evaluation))
    lists, buckets = config.evaluation.listwise, config.generator.prompt_buckets
    check_prompts(systems, models.generator, lists, buckets)
    check_contrastive_batch(
        config.contrastive,
        models.retriever,
        models.retriever_params,
        models.contrastive_mesh,
        len(data.retriever_train),
    )
    check_step_b(config, data, models.dpo_mesh)
    has_vectors = run.processes.count == 1 or not is_bucket(run.address)
    check_distillation(config.distill, models.contrastive_mesh, has_vectors)

    corpus = data.collection.corpus
    words = run_words(run, corpus)
    tools = RewardTools(words, functions)
    retriever = functools.partial(run_retriever, run, models, corpus)
    current, adapter = retriever(models.retriever_params, "zero-shot"), None
    retrievers, adapters = {"zero-shot": current}, {"base": adapter}
    ids = data.retriever_train
    negatives = training_negatives(run, current, data, ids, "round-0", "round 0")
    for name in ("fine-tuned", ALL_LABELS):
        if any(name in system.retrievers for system in systems):
            retrievers[name] = retriever(
                _baseline(run, models, data, negatives, current, name), name
            )
    for round_ in range(config.rounds):
        if round_ > 0:
            of_round = f"round-{round_}", f"round {round_}"
            negatives = training_negatives(run, current, data, ids, *of_round)
        with run.phase(f"expansions, round {round_}"):
            expander = run_expander(run, models, data, words, current.find)
            expander = with_demonstrations(run, models, expander, current, data, tools)
            if round_ == 0:
                adapter = warm_start(run, models, expander, current, data, tools)
            expansions = training_expansions(run, data, expander, adapter, round_)
            current.release()
        with run.phase(f"retriever, round {round_}"):
            start = models.retriever_params if config.contrastive.restart else current.params
            params = _train(run, models, data, expansions, negatives, start, round_=round_)
        last = round_ == config.rounds - 1
        name = "expandr" if last else f"round-{round_}"
        retrievers[name] = current = retriever(params, name)
        adapter = _step_b(run, models, expander, adapter, current, data, round_, tools)
        adapters["trained" if last else name] = adapter

    if config.distill.epochs:
        retrievers |= make_towers(run, models, data, words, current, adapter)
    if config.figret.rank:
        retrievers |= figret(run, models, data, expander.sampler, current, adapter)
    results = evaluate_systems(run, models, data, retrievers, adapters)
    evaluate_benchmarks(run, models, retrievers, adapters, results["chosen"])

    tower, turned = (
        retrievers[name].params if name in retrievers else None for name in (DISTILLED, FIGRET)
    )
    count = len(exports_of(config))
    with run.phase("export"), run.reporter.progress("models exported", count) as advance:
        run.processes.once(
            lambda: export_run(
                run, models.retriever, current.params, adapter, tower, turned, advance
            )
        )
    run.checksums.record(*_written(config))
    return _end(run, results)


def check_step_b(config: Config, data: TrainingData, mesh: Mesh) -> None:
    """Refuses, before step A, what step B or its warm start cannot be trained with."""
    kind, sections = config.step_b_kind, {"dpo": config.dpo} if config.warm_start else {}
    if kind.on_policy:
        check_policy(config.learned, kind.section, data, mesh)
    else:
        sections[kind.section] = config.learned
    for name, settings in sections.items():
        check_batch_size(f"{name}.batch_size", settings.batch_size, mesh)


def _step_b(
    run: Run,
    models: Models,
    expander: Expander,
    adapter: Any,
    retriever: CorpusRetriever,
    data: TrainingData,
    round_: int,
    tools: RewardTools,
) -> Any:
    """The adapter after a round of step B, as the config has it."""
    config, phase = run.config, f"{run.config.step_b_kind.phase}, round {round_}"
    objective, directory = config.objective, f"round-{round_}"
    if objective is None:
        with run.phase(phase):
            return train_policy(
                run, models, expander, retriever, data, adapter, tools, round_=round_
            )
    make_preferences(run, models.generator, expander, adapter, retriever, data, directory, tools)
    with run.phase(phase):
        path = run.path(directory, objective.file)
        rows, dropped = read_rows(objective, config, path, models.generator, own=True)
        run.reporter.say(objective.counted(len(rows), dropped))
        return train_generator(run, models, adapter, rows, round_=round_)


def _written(config: Config) -> list[str]:
    """What a run writes for others, from the workdir; the report is made of these each time."""
    rounds = [f"round-{round_}" for round_ in range(config.rounds)]
    exports = [f"export/{name}" for name in exports_of(config)]
    tests = ["tests", *_tests(config)] if config.data.tests else []
    distilled = ["distilled"] if config.distill.epochs and config.distill.documents else []
    return ["data", *rounds, *distilled, *result_files(""), *tests, *exports]


def _tests(config: Config) -> list[str]:
    """Where the results of further collections are, from the workdir."""
    return [f"tests/{name}" for name in find_benchmarks(config.data.tests)]


def _results_if_done(run: Run) -> dict[str, Any] | None:
    """The contents of results.json, where nothing is left to do or to add; else None."""
    if not run.checksums.unchanged(*_written(run.config)):
        return None
    systems = systems_of_run(run.config)
    several = [run.read_json(run.path(f, "results.json")) for f in ("", *_tests(run.config))]
    return several[0] if all(are_of(results, systems) for results in several) else None


def _end(run: Run, results: dict[str, Any]) -> dict[str, Any]:
    """Writes the report, shows the results and ends the run."""
    with run.phase("report"), run.reporter.progress("pages written", 1) as advance:
        report = run.processes.once(lambda: run.where(write_report(run.workdir)))
        advance(1)
    run.console.print(results_table(results))
    run.console.print(f"report: {report}", soft_wrap=True)
    run.close()
    return results


def _grow(run: Run, grown: Mapping[str, Any]) -> None:
    """Makes room for what settings have grown by; `grown` are their values before.

    Where more rounds follow, what was made of the last one bears that round's name.
    """
    if "data.tests" in grown:
        added = [path for path in run.config.data.tests if path not in grown["data.tests"]]
        check_added_tests(added, run.path("data"), generated_queries(run.path(GENERATED)))
    if "rounds" not in grown:
        return
    name = f"round-{grown['rounds'] - 1}"
    for directory, pattern, old in (
        ("work/vectors", "expandr*", "expandr"), ("work", "evaluation-trained*", "trained"),
    ):  # fmt: skip
        for path in sorted(run.path(directory).rglob(pattern), reverse=True):
            target = path.with_name(path.name.replace(old, name, 1))
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    run.checksums.forget(*(f"export/{name}" for name in exports_of(run.config)))


def _note_tests(run: Run) -> None:
    """Notes of what files the collections of `data.tests` are that training leaves out.

    Raises:
        UserError: A run that began before these were noted has read other documents.
    """

    def note() -> None:
        tests = find_benchmarks(run.config.data.tests)
        with run.reporter.progress("test collections noted", len(tests)) as advance:
            for name, benchmark in tests.items():
                directory = run.path("tests", name)
                path = directory / "data" / "SOURCE.json"
                if not path.exists():
                    read = sealed_key(run.path("work", "documents", "tests", name))
                    if read and read != corpus_key(benchmark.files):
                        raise UserError(
                            f"{run.where(directory)}: was made with other documents than "
                            f"{benchmark.files.path('')} has now; put back what was there, or use "
                            "a new --workdir"
                        )
                    write_json(path, benchmark.source(name))
                advance(1)

    run.processes.once(note)


def _check_server(config: Config, systems: Sequence[System]) -> None:
    """Refuses, before hours of work, a server that would have to sample with the adapter."""
    if not config.generator.server.url:
        return
    adapted = [system.name for system in systems if "trained" in system.generators]
    if config.rounds > 1 or adapted:
        raise UserError(
            "generator.server.url: the server has the base model only; set rounds to 1 and leave "
            f"{', '.join(adapted) or 'further rounds'} out of evaluation.systems, or empty the URL"
        )


def _baseline(
    run: Run,
    models: Models,
    data: TrainingData,
    negatives: Mapping[str, list[str]],
    retriever: CorpusRetriever,
    name: str,
) -> Any:
    """The parameters of a retriever that is trained on plain queries, for a round of step A.

    Args:
        negatives: Those of step A's queries in the first round.
        retriever: The one before training.
        name: "fine-tuned": on step A's queries; `ALL_LABELS`: on those of step B as well.
    """
    ids = data.retriever_train
    if name == ALL_LABELS:
        more = data.generator_train
        own = training_negatives(run, retriever, data, more, f"work/{name}", name)
        negatives = collections.ChainMap(own, negatives)
        ids = [*ids, *more]
    with run.phase(f"{name} baseline"):
        return _train(run, models, data, {}, negatives, retriever.params, phase=name, ids=ids)


def _train(
    run: Run,
    models: Models,
    data: TrainingData,
    expansions: Mapping[str, list[str]],
    negatives: Mapping[str, list[str]],
    start: Any,
    *,
    phase: str = "retriever",
    round_: int = 0,
    ids: Sequence[str] | None = None,
) -> Any:
    """Step A on training queries, expanded or plain: the trained retriever's parameters.

    Without `ids` they are its own; there are as many updates with others.
    """
    ids, settings = data.retriever_train if ids is None else ids, run.config.contrastive
    corpus = data.collection.corpus

    def triple(number: int) -> Triple:
        query = ids[number]
        return Triple(
            data.collection.queries[query],
            tuple(corpus[document] for document in data.positives(query)),
            tuple(negatives.get(query, ())),
            tuple(filter(None, expansions.get(query, ()))),
        )

    return train_retriever(
        run,
        models,
        start,
        MadeTriples(data.queries(ids), triple),
        kind=run.config.expansion.kind,
        phase=phase,
        round_=round_,
        samples=len(next(iter(expansions.values()), ())),
        ids=ids,
        updates=count_updates(settings, len(data.retriever_train) // settings.batch_size),
    )


if __name__ == "__main__":
    launch_training(train_joint)
