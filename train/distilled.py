"""Distilled expansion in a run: its queries, what their teacher says, and the towers that learn it.

The teacher is the run's retriever with the trained generator's passages, used as dev chose for the
row `expandr`. The student encodes plain queries; the documents' vectors are the retriever's own.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.benchmarks import benchmark_queries
from expandr_jax.data.documents import ids_of, rows_of
from expandr_jax.data.generated import drawn_documents, sorted_out
from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.errors import UserError
from expandr_jax.expansion.combine import MEAN
from expandr_jax.expansion.expand import Expander, expansion_requests, journaled
from expandr_jax.expansion.prompts import DOCUMENT_PROMPTS
from expandr_jax.expansion.sampled import MadeWhenAsked, sample_texts
from expandr_jax.expansion.strategies import Strategy, document_message
from expandr_jax.files.records import hash_json, read_jsonl, write_json, write_jsonl
from expandr_jax.objectives.distillation import (
    Compared,
    contrastive_losses,
    distilled_losses,
    documents_of,
    targets_of,
)
from expandr_jax.pair import Models
from expandr_jax.ranking.choices import Choice, DevChoices, expansion_grid
from expandr_jax.ranking.ranker import Expansions, Ranker, Searches
from expandr_jax.ranking.systems import CONTROL, DISTILLED, OURS, parse_system
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.run import Run
from expandr_jax.search import Index
from expandr_jax.training.setup import check_batch_size
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.file import content_key, encode_to_file
from expandr_jax.vectors.stored import open_vectors
from train.expansions import SPLITS, run_expander, written_for
from train.query_tower import train_query_tower

TAUGHT_AT_ONCE = 1024  # Queries whose texts' vectors are in memory together.
GENERATED = "distilled/queries.jsonl"
PROMPT = "d2q"  # What the generator is asked of a document.
_LEAF = parse_system(OURS)  # The teacher.


@dataclasses.dataclass(frozen=True)
class Queries:
    """What query towers learn from.

    Attributes:
        texts: Query id -> query.
        relevant: Ids of the relevant documents of each, the best first, in the same order.
    """

    texts: Mapping[str, str]
    relevant: Sequence[Sequence[str]]

    @functools.cached_property
    def key(self) -> str:
        """sha256 over all of it."""
        return hash_json([[*self.texts.items()], [[*of] for of in self.relevant]])


def check_distillation(run: Run, models: Models) -> None:
    """Refuses, before hours of work, settings that do not fit the devices or the workdir."""
    settings = run.config.distill
    if not settings.epochs:
        return
    check_batch_size("distill.batch_size", settings.batch_size, models.contrastive_mesh)
    # Process 0 alone has the documents' vectors there.
    shared = run.processes.count > 1 and is_bucket(run.address)
    if shared and (settings.kl_weight or settings.control):
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
    settings, last = run.config.distill, run.config.rounds - 1
    expander = run_expander(run, models, data, words, ours.find)
    with run.phase("queries to distill from"):
        queries = _queries(run, data, expander)
    if len(queries.texts) < settings.batch_size:
        raise UserError(
            f"{len(queries.texts)} queries do not fill one batch of {settings.batch_size}; lower "
            "distill.batch_size"
        )
    choice, strategy = _choice(run, data, expander, ours, adapter)
    _ = ours.corpus  # All processes encode it together, where it is not done.
    with run.phase("expansions to distill"):
        texts = _expansions(run, expander, adapter, queries, choice)
        targets = _targets(run, ours, queries, choice, strategy, texts)
    with run.phase("distillation"):
        tower = functools.partial(
            train_query_tower, run, models, data, ours, queries.texts, round_=last
        )
        towers = {
            DISTILLED: tower(
                _compared(run, ours, targets), losses=distilled_losses, phase="distill",
                name=f"distilled-{last}", of=[queries.key, content_key(targets)],
            )
        }  # fmt: skip
    if settings.control:
        with run.phase("distillation, control"):
            rows = rows_of(data.collection.corpus)
            relevant = [[rows[document] for document in of] for of in queries.relevant]
            towers[CONTROL] = tower(
                documents_of(relevant, _vectors(ours)), losses=contrastive_losses,
                phase="distill-control", name=f"distilled-control-{last}", of=[queries.key],
            )  # fmt: skip
    ours.release()
    return {
        name: dataclasses.replace(ours, params=params, documents=ours)
        for name, params in towers.items()
    }


def _queries(run: Run, data: TrainingData, expander: Expander) -> Queries:
    """The run's training queries, and those that the generator writes for documents.

    Writes distilled/queries.jsonl.
    """
    settings, known = run.config.distill, data.collection.queries
    trained = limit_queries([*data.retriever_train, *data.generator_train], settings.train_queries)
    texts = {query: known[query] for query in trained}
    relevant = [data.positives(query) for query in trained]
    if settings.documents:
        _generate(run, data, expander)
        for row in _kept(run):
            texts[row["query_id"]] = row["query"]
            relevant.append([row["document_id"]])
    run.reporter.say(f"{len(texts)} queries, {len(trained)} of them with judgements")
    return Queries(texts, relevant)


def generated_queries(run: Run) -> dict[str, str]:
    """Query id -> query, of those that towers of a run learn from and that were written for it."""
    there = run.path(GENERATED).exists()
    return {row["query_id"]: row["query"] for row in _kept(run)} if there else {}


def _kept(run: Run) -> Iterator[dict[str, Any]]:
    """Rows of the generated queries that are not left out."""
    fields = {"query_id": str, "document_id": str, "query": str, "left_out": str}
    rows = (row for _, row in read_jsonl(run.path(GENERATED), fields))
    return (row for row in rows if not row["left_out"])


def _generate(run: Run, data: TrainingData, expander: Expander) -> None:
    """Has queries written for documents, by the generator before training; says what is left out.

    `GENERATED` has them all, those that are left out, too.
    """
    config, collection, sampler = run.config, data.collection, expander.sampler
    settings, corpus = config.distill, collection.corpus
    drawn = drawn_documents(ids_of(corpus), settings.documents, config.seed)
    most = config.answer.max_characters
    messages = MadeWhenAsked(
        drawn, lambda document: document_message(PROMPT, corpus[document], most, sampler.fits)
    )
    written = sample_texts(
        sampler,
        None,
        expansion_requests(config.expansion, messages, settings.queries_per_document),
        path=run.path("work", "generated-queries.jsonl"),
        purpose="queries of documents",
    )

    def write() -> dict[str, int]:
        tested = benchmark_queries(config.data.tests)
        for split in SPLITS:
            tested |= {collection.queries[query] for query in collection.qrels[split]}
        keys = [*written]
        sorted_ = sorted_out(
            ((f"{PROMPT}/{document}/{sample}", written[document, sample])
             for document, sample in keys),
            data.queries([*data.retriever_train, *data.generator_train]),
            tested,
            DOCUMENT_PROMPTS[PROMPT].message(document=""),
        )  # fmt: skip
        rows, counts = [], collections.Counter()
        for (document, _), (name, query, why) in zip(keys, sorted_, strict=True):
            counts[why] += 1
            rows.append(
                {"query_id": name, "document_id": document, "query": query, "left_out": why}
            )
        write_jsonl(run.path(GENERATED), rows)
        return dict(sorted(counts.items()))

    counts = run.processes.once(write)
    dropped = "".join(f"; {count} left out: {why}" for why, count in counts.items() if why)
    run.reporter.say(f"{counts.get('', 0)} queries written for {len(drawn)} documents{dropped}")


def _choice(
    run: Run, data: TrainingData, expander: Expander, ours: CorpusRetriever, adapter: Any
) -> tuple[Choice, Strategy]:
    """How the row `expandr` uses its passages, by dev as in the evaluation, and its strategy.

    Its mean of vectors, whatever `expansion.combine` is: a tower learns one vector.
    """
    leaf, last = _LEAF, run.config.rounds - 1
    path = run.path("work", f"round-{last}", "distilled-choice.json")
    strategy = expander.strategy.in_a_run
    if not run.processes.once(path.exists):
        written = written_for(run, data, expander, adapter, leaf.generator, leaf.strategy)
        strategy, texts, *_ = written
        judged = data.collection.qrels["dev"]
        dev = {query: data.collection.queries[query] for query in judged}
        expansions = Expansions(strategy, [texts[query] for query in dev])
        ranker = _ranker(run, dev, ours, expansions, excluded=data.collection.excluded)
        choices = DevChoices(
            lambda: ranker,
            judged,
            lambda _: expansion_grid(run.config.evaluation, MEAN, len(strategy.asks)),
            made={},
            is_main=run.processes.is_main,
        )
        with run.phase("how expansions are used"):
            _ = ours.corpus
            best = choices(leaf)
            run.processes.once(lambda: write_json(path, dataclasses.asdict(best)))
    return Choice(**run.read_json(path)), strategy


def _ranker(
    run: Run,
    queries: Mapping[str, str],
    retriever: CorpusRetriever,
    expansions: Expansions,
    **options: Any,
) -> Ranker:
    """Ranks queries by the teacher, or has their vectors; options are the ranker's."""
    return Ranker(
        queries,
        Searches(lambda _: None, lambda *_: retriever, retriever.texts),
        lambda _: expansions,
        lambda _: None,
        run.config.evaluation,
        **{"is_main": run.processes.is_main, **options},
    )


def _expansions(
    run: Run, expander: Expander, adapter: Any, queries: Queries, choice: Choice
) -> Mapping[str, list[list[str]]]:
    """Query id -> the passages that the trained generator writes for it, by `Ask`."""
    journal = run.path("work", f"round-{run.config.rounds - 1}", "distilled-expansions.jsonl")
    sample = journaled(expander, adapter, journal, "distillation")
    count = choice.samples // len(expander.strategy.asks)
    return expander.texts(queries.texts, count, sample)


def _targets(
    run: Run,
    ours: CorpusRetriever,
    queries: Queries,
    choice: Choice,
    strategy: Strategy,
    texts: Mapping[str, list[list[str]]],
) -> pathlib.Path:
    """The file of the teacher's vectors, [queries, dim] of unit length; process 0 makes it."""
    path = run.path("work", f"round-{run.config.rounds - 1}", "distilled-targets.npy")
    alone, every = dataclasses.replace(ours, processes=Processes()), [*queries.texts]
    used = [*dataclasses.astuple(choice), ours.normalize]

    def vectors(first: int, last: int) -> np.ndarray:
        some = {query: queries.texts[query] for query in every[first:last]}
        expansions = Expansions(strategy, [texts[query] for query in some])
        ranker = _ranker(run, some, alone, expansions, is_main=True)
        found = ranker.query_vectors(_LEAF, choice)
        advance(len(some))
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def write() -> None:
        # What the vectors are of, so that a file of other passages, or of another use of them, is
        # found to be one.
        described = (json.dumps([queries.texts[q], used, texts[q]]) for q in every)
        encode_to_file(
            path, ours.encoder, ours.params, described, "query", block=TAUGHT_AT_ONCE,
            vectors=vectors,
        )  # fmt: skip

    with run.reporter.progress("distillation: queries encoded", len(every)) as advance:
        run.processes.once(write)
    return path


def _compared(run: Run, ours: CorpusRetriever, targets: pathlib.Path) -> Compared:
    """What the student's batches have of its teacher."""
    vectors = open_vectors(targets)
    if not run.config.distill.kl_weight:
        return targets_of(vectors)
    found = _found(run, ours, vectors)
    return targets_of(vectors, _vectors(ours), np.load(found, mmap_mode="r", allow_pickle=False))


def _found(run: Run, ours: CorpusRetriever, targets: Any) -> pathlib.Path:
    """The file of the documents' rows that each teacher finds first, [queries, depth] int32."""
    name = f"work/round-{run.config.rounds - 1}/distilled-found.npy"
    path, part = run.path(name), run.path(f"{name}.part")
    if run.checksums.intact(name):
        return path
    rows, index = [], ours.corpus.index
    if run.processes.is_main:
        with run.reporter.progress("distillation: queries searched", len(targets)) as advance:
            for first in range(0, len(targets), TAUGHT_AT_ONCE):
                block = np.asarray(targets[first : first + TAUGHT_AT_ONCE], np.float32)
                rows.append(index.search(block, run.config.distill.depth)[1])
                advance(len(block))

    def write() -> None:
        with open(part, "wb") as file:
            np.save(file, np.concatenate(rows).astype(np.int32))
        part.replace(path)

    run.processes.once(write)
    run.checksums.record(name)
    return path


def _vectors(ours: CorpusRetriever) -> Any:
    """The documents' vectors, by each process from their file."""
    _ = ours.corpus
    return open_vectors(ours.path)
