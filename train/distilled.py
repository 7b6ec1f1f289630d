"""Distilled expansion in a run: its queries, what their teacher says, and the towers that learn it.

The teacher is the run's retriever with the trained generator's passages, used as is best on dev.
The student encodes plain queries; the documents' vectors are the retriever's own.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.data.benchmarks import benchmark_queries
from expandr_jax.data.documents import ids_of, rows_of
from expandr_jax.data.generated import (
    JudgedQueries,
    drawn_documents,
    generated_names,
    generated_rows,
)
from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, expansion_requests, journaled
from expandr_jax.expansion.prompts import DOCUMENT_PROMPTS
from expandr_jax.expansion.sampled import MadeWhenAsked, sample_texts
from expandr_jax.expansion.strategies import document_message
from expandr_jax.files.records import read_jsonl, write_json, write_jsonl
from expandr_jax.objectives.distillation import (
    Compared,
    Lesson,
    contrastive_losses,
    distilled_losses,
    documents_of,
    targets_of,
)
from expandr_jax.objectives.distillation_stage import train_query_tower
from expandr_jax.objectives.settings import DistillSettings
from expandr_jax.objectives.trained import training_retriever
from expandr_jax.pair import Models
from expandr_jax.ranking.choices import Choice
from expandr_jax.ranking.sources import Expansions
from expandr_jax.ranking.systems import DISTILLED, DISTILLED_CONTROL
from expandr_jax.ranking.teacher import (
    TEACHER,
    Teacher,
    best_use,
    found_by_teacher,
    student_on_dev,
)
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.run import Run
from expandr_jax.search import Index
from expandr_jax.training.setup import check_batch_size
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.file import content_key
from expandr_jax.vectors.stored import open_vectors
from train.expansions import RANKED_SPLITS, run_expander, written_for

GENERATED = "distilled/queries.jsonl"
# Each line of the generated queries has them.
GENERATED_FIELDS = {"query_id": str, "document_id": str, "query": str, "left_out": str}
QUERY_PROMPT = "d2q"  # What the generator is asked of a document.


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


def distill(
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
    settings, place = config.distill, f"work/round-{last}"
    expander = run_expander(run, models, data, words, ours.find)
    with run.phase("queries to distill from"):
        queries = _queries(config, data, expander, run.workdir)
    teacher = _teacher(run, data, expander, ours, adapter)
    _ = ours.corpus  # All processes encode it together, where it is not done.
    with run.phase("expansions to distill"):
        journal = run.path(place, "distilled-expansions.jsonl")
        sample = journaled(expander, adapter, journal, "distillation")
        each = teacher.choice.samples // len(expander.strategy.asks)
        texts = expander.texts(queries.texts, each, sample)
        targets, count = run.path(place, "distilled-targets.npy"), len(queries.texts)
        with run.reporter.progress("distillation: queries encoded", count) as advance:
            run.processes.once(lambda: teacher.write(targets, queries.texts, texts, advance))
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
        name = f"{place}/distilled-found.npy"
        compared = _compared(settings, ours, targets, run.checksums, name)
        lesson = Lesson(queries.texts, compared, distilled_losses, of)
        towers = {DISTILLED: tower("distilled", "distill", lesson)}
    if settings.control:
        with run.phase("distillation, control"):
            rows = rows_of(data.collection.corpus)
            relevant = [[rows[document] for document in of] for of in queries.relevant]
            compared = documents_of(relevant, _vectors(ours))
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
        for row in _kept(workdir / GENERATED):
            texts[row["query_id"]] = row["query"]
            relevant.append([row["document_id"]])
    expander.sampler.reporter.say(f"{len(texts)} queries, {len(trained)} of them with judgements")
    if len(texts) < settings.batch_size:
        raise UserError(
            f"{len(texts)} queries do not fill one batch of {settings.batch_size}; lower "
            "distill.batch_size"
        )
    return JudgedQueries(texts, relevant)


def generated_queries(path: pathlib.Path) -> dict[str, str]:
    """Query id -> query, of the queries that towers learn from and that were written for it.

    `path` is `GENERATED` in the workdir, which may not be there.
    """
    return {row["query_id"]: row["query"] for row in _kept(path)} if path.exists() else {}


def _kept(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Rows of the generated queries that are not left out."""
    return (row for _, row in read_jsonl(path, GENERATED_FIELDS) if not row["left_out"])


def _rows_of(path: pathlib.Path, names: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows that a file has, if they are of these names.

    Vectors, passages and towers are of the queries that a run once took. A later version may take
    others of the same texts.
    """
    try:
        rows = [row for _, row in read_jsonl(path, GENERATED_FIELDS)] if path.exists() else []
    except UserError:  # Damaged: it is written again.
        return None
    return rows if [row["query_id"] for row in rows] == [*names] else None


def _generate(
    config: Config, data: TrainingData, expander: Expander, workdir: pathlib.Path
) -> None:
    """Has queries written for documents, by the generator before training; says what is left out.

    `GENERATED` has them all, those that are left out, too.
    """
    collection, sampler, settings = data.collection, expander.sampler, config.distill
    drawn = drawn_documents(ids_of(collection.corpus), settings.documents, config.seed)
    most = config.answer.max_characters
    messages = MadeWhenAsked(
        drawn,
        lambda document: document_message(
            QUERY_PROMPT, collection.corpus[document], most, sampler.fits
        ),
    )
    written = sample_texts(
        sampler,
        None,
        expansion_requests(config.expansion, messages, settings.queries_per_document),
        path=workdir / "work" / "generated-queries.jsonl",
        purpose="queries of documents",
    )

    def write() -> dict[str, int]:
        tested = benchmark_queries(config.data.tests)
        for split in RANKED_SPLITS:
            tested |= {collection.queries[query] for query in collection.qrels[split]}
        trained = data.queries([*data.retriever_train, *data.generator_train])
        asked = DOCUMENT_PROMPTS[QUERY_PROMPT].message(document="")
        rows = _rows_of(workdir / GENERATED, generated_names(written, QUERY_PROMPT))
        if rows is None:
            rows = generated_rows(written, QUERY_PROMPT, trained, tested, asked)
            write_jsonl(workdir / GENERATED, rows)
        return dict(sorted(collections.Counter(row["left_out"] for row in rows).items()))

    counts = sampler.processes.once(write)
    dropped = "".join(f"; {count} left out: {why}" for why, count in counts.items() if why)
    sampler.reporter.say(f"{counts.get('', 0)} queries written for {len(drawn)} documents{dropped}")


def _teacher(
    run: Run, data: TrainingData, expander: Expander, ours: CorpusRetriever, adapter: Any
) -> Teacher:
    """The run's teacher, which uses its passages as is best on dev."""
    settings, samples = run.config.evaluation, run.config.distill.samples
    place, judged = f"round-{run.config.rounds - 1}", data.collection.qrels["dev"]
    path = run.path("work", place, "distilled-choice.json")
    strategy = expander.strategy.in_a_run
    if not run.processes.once(path.exists):
        if (most := max(samples, default=0)) > max(settings.samples):
            # The first of them are the evaluation's, drawn again with the same numbers.
            queries = {query: data.collection.queries[query] for query in judged}
            journal = run.path("work", place, "distilled-dev-expansions.jsonl")
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


def _compared(
    settings: DistillSettings,
    ours: CorpusRetriever,
    targets: pathlib.Path,
    checksums: Checksums,
    name: str,
) -> Compared:
    """What the student's batches have of its teacher; `name`: where what that finds is kept."""
    vectors = open_vectors(targets)
    if not settings.kl_weight:
        return targets_of(vectors)

    def found() -> np.ndarray | None:
        index = ours.corpus.index  # Each process has its part of it.
        if not ours.processes.is_main:
            return None
        with ours.reporter.progress("distillation: queries searched", len(vectors)) as advance:
            return found_by_teacher(index, vectors, settings.depth, advance)

    rows = np.load(checksums.array(name, found), mmap_mode="r", allow_pickle=False)
    return targets_of(vectors, _vectors(ours), rows)


def _vectors(ours: CorpusRetriever) -> Any:
    """The documents' vectors, by each process from their file."""
    _ = ours.corpus
    return open_vectors(ours.path)
