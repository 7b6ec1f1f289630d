"""Distilled expansion in a run: its queries, what their teacher says, and the towers that learn it.

The teacher is the run's retriever with the trained generator's passages, used as is best on dev.
The student encodes plain queries; the documents' vectors are the retriever's own.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.data.benchmarks import benchmark_queries
from expandr_jax.data.documents import rows_of
from expandr_jax.data.generated import JudgedQueries
from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled
from expandr_jax.expansion.written_queries import kept_queries, write_queries
from expandr_jax.files.records import write_json
from expandr_jax.objectives.distillation import (
    Lesson,
    contrastive_losses,
    distilled_losses,
    documents_of,
)
from expandr_jax.objectives.distillation_stage import (
    compared_with_teacher,
    document_vectors,
    train_query_tower,
)
from expandr_jax.objectives.settings import DistillSettings
from expandr_jax.objectives.trained import training_retriever
from expandr_jax.pair import Models
from expandr_jax.ranking.choices import Choice
from expandr_jax.ranking.sources import Expansions
from expandr_jax.ranking.systems import DISTILLED, DISTILLED_CONTROL
from expandr_jax.ranking.teacher import TEACHER, Teacher, best_use, student_on_dev
from expandr_jax.runtime.run import Run
from expandr_jax.search import Index
from expandr_jax.training.setup import check_batch_size
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.file import content_key
from train.expansions import RANKED_SPLITS, run_expander, written_for

GENERATED = "distilled/queries.jsonl"


def check_distillation(settings: DistillSettings, mesh: Mesh, has_vectors: bool) -> None:
    """Refuses, before hours of work, settings that do not fit the devices or the workdir.

    `has_vectors` says whether each process will see the documents' vectors.
    """
    if not settings.epochs:
        return
    check_batch_size("distill.batch_size", settings.batch_size, mesh)
    if not has_vectors and (settings.kl_weight or settings.control):
        raise UserError(
            "distill.kl_weight and distill.control: several processes in a bucket do not have the "
            "documents' vectors; set them to 0 and False, or use a directory that all share"
        )


def make_towers(
    run: Run,
    models: Models,
    data: TrainingData,
    words: Callable[[], Index],
    ours: CorpusRetriever,
    adapter: Any,
) -> dict[str, CorpusRetriever]:
    """Query towers of a run, by their rows.

    Args:
        run, models, data: The run, when all of its rounds are done.
        words: BM25's index of the corpus.
        ours: The trained retriever; its documents' vectors stay what they are.
        adapter: The trained generator's.

    Raises:
        UserError: A setting does not fit the data or the mesh, or training diverges.
    """
    config, last = run.config, run.config.rounds - 1
    settings, folder = config.distill, f"work/round-{last}"
    expander = run_expander(run, models, data, words, ours.find)
    with run.phase("queries to distill from"):
        queries = _queries(config, data, expander, run.workdir)
    teacher = _teacher(run, data, expander, ours, adapter)
    _ = ours.corpus  # All processes encode it together, where it is not done.
    with run.phase("expansions to distill"):
        journal = run.path(folder, "distilled-expansions.jsonl")
        sample = journaled(expander, adapter, journal, "distillation")
        each = teacher.choice.samples // len(expander.strategy.asks)
        texts = expander.texts(queries.texts, each, sample)
        targets, count = run.path(folder, "distilled-targets.npy"), len(queries.texts)
        with run.reporter.progress("distillation: queries encoded", count) as advance:
            teacher.write(targets, queries.texts, texts, advance)
    retriever = training_retriever(models.retriever, config.contrastive)
    trained = dataclasses.replace(models, retriever=retriever)

    def tower(name: str, phase: str, lesson: Lesson) -> Any:
        return train_query_tower(
            run.trained_stage(f"{name}-{last}", last, phase=phase),
            trained,
            ours.params,
            lesson,
            settings,
            config.seed,
            lambda params: student_on_dev(ours, params, data.collection, config.evaluation),
        )

    with run.phase("distillation"):
        of = queries.key, content_key(targets)
        name = f"{folder}/distilled-found.npy"
        compared = compared_with_teacher(settings, ours, targets, run.checksums, name)
        lesson = Lesson(queries.texts, compared, distilled_losses, of)
        towers = {DISTILLED: tower("distilled", "distill", lesson)}
    if settings.control:
        with run.phase("distillation, control"):
            rows = rows_of(data.collection.corpus)
            relevant = [[rows[document] for document in of] for of in queries.relevant]
            compared = documents_of(relevant, document_vectors(ours))
            lesson = Lesson(queries.texts, compared, contrastive_losses, [queries.key])
            towers[DISTILLED_CONTROL] = tower("distilled-control", "distill-control", lesson)
    ours.release()
    return {
        name: dataclasses.replace(ours, params=params, documents=ours)
        for name, params in towers.items()
    }


def _queries(
    config: Config, data: TrainingData, expander: Expander, workdir: pathlib.Path
) -> JudgedQueries:
    """A run's training queries, and those that the generator writes for documents.

    Writes distilled/queries.jsonl.
    """
    settings, known = config.distill, data.collection.queries
    trained = limit_queries([*data.retriever_train, *data.generator_train], settings.train_queries)
    texts = {query: known[query] for query in trained}
    relevant = [data.positives(query) for query in trained]
    if settings.documents:
        _generate(config, data, expander, workdir)
        for row in kept_queries(workdir / GENERATED):
            texts[row["query_id"]] = row["query"]
            relevant.append([row["document_id"]])
    expander.sampler.reporter.say(f"{len(texts)} queries, {len(trained)} of them with judgements")
    if len(texts) < settings.batch_size:
        raise UserError(
            f"{len(texts)} queries do not fill one batch of {settings.batch_size}; lower "
            "distill.batch_size"
        )
    return JudgedQueries(texts, relevant)


def _generate(
    config: Config, data: TrainingData, expander: Expander, workdir: pathlib.Path
) -> None:
    """Writes `GENERATED`: queries for documents; those that dev or a test asks are left out."""
    collection, settings = data.collection, config.distill

    def tested() -> set[str]:
        found = benchmark_queries(config.data.tests)
        for split in RANKED_SPLITS:
            found |= {collection.queries[query] for query in collection.qrels[split]}
        return found

    write_queries(
        data,
        expander.sampler,
        config.expansion,
        tested,
        documents=settings.documents,
        each=settings.queries_per_document,
        most_characters=config.answer.max_characters,
        seed=config.seed,
        journal=workdir / "work" / "generated-queries.jsonl",
        path=workdir / GENERATED,
    )


def _teacher(
    run: Run, data: TrainingData, expander: Expander, ours: CorpusRetriever, adapter: Any
) -> Teacher:
    """The run's teacher, which uses its passages as is best on dev."""
    settings, samples = run.config.evaluation, run.config.distill.samples
    folder, judged = f"round-{run.config.rounds - 1}", data.collection.qrels["dev"]
    path = run.path("work", folder, "distilled-choice.json")
    strategy = expander.strategy.in_a_run
    if not run.processes.once(path.exists):
        if (most := max(samples, default=0)) > max(settings.samples):
            # The first of them are the evaluation's, drawn again with the same numbers.
            queries = {query: data.collection.queries[query] for query in judged}
            journal = run.path("work", folder, "distilled-dev-expansions.jsonl")
            with run.phase("expansions for the teacher's choice"):
                sample = journaled(expander, adapter, journal, "evaluation")
                texts = expander.texts(queries, most, sample)
        else:
            asked = TEACHER.generator, TEACHER.strategy
            texts = written_for(run, data, expander, adapter, *asked)[1]
        dev = Expansions(strategy, [texts[query] for query in judged])

        def say(text: str) -> None:
            run.reporter.say(f"teacher of {DISTILLED}: {text}")

        with run.phase("how expansions are used"):
            best = best_use(ours, data.collection, dev, settings, samples, say)
            run.processes.once(lambda: write_json(path, dataclasses.asdict(best)))
    return Teacher(ours, strategy, Choice(**run.read_json(path)), settings)
