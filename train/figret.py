"""FiGRet in a run: after its last round, an extra turn on queries that the retriever fails.

The trained generator writes easier passages for them, and the turn goes from easy to hard. Another
turn beside it, the control, has as many ordinary triples of the same queries in no order.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.config import Config
from expandr_jax.data.documents import rows_of
from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.data.triples import Triple
from expandr_jax.expansion.expand import drawing
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.expansion.sampled import Texts, sample_texts
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import fitted_message
from expandr_jax.files.records import read_jsonl, write_jsonl
from expandr_jax.generation.requests import Request, Requests
from expandr_jax.generation.sampler import Sampler
from expandr_jax.objectives.figret import (
    PASSAGE_PROMPTS,
    easier_triples,
    failed_queries,
    with_margin,
)
from expandr_jax.pair import Models
from expandr_jax.ranking.systems import FIGRET, FIGRET_CONTROL
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import batch_divisor
from expandr_jax.vectors.corpus import CorpusRetriever
from train.encoding import run_retriever
from train.negatives import encoded_queries, mine_triples
from train.retriever import train_retriever


def figret(
    run: Run,
    models: Models,
    data: TrainingData,
    sampler: Sampler,
    ours: CorpusRetriever,
    adapter: Any,
) -> dict[str, CorpusRetriever]:
    """The retrievers after the turn and after the control's, by their rows.

    Writes round-R/figret.jsonl, the turn's triples.

    Args:
        run, models, data: The run, when all of its rounds are done.
        sampler: Writes, by the config's section `expansion`.
        ours: The trained retriever.
        adapter: The trained generator's.
    """
    config, place = run.config, f"round-{run.config.rounds - 1}"
    failed, name = f"work/{place}/figret-failed.jsonl", f"{place}/figret.jsonl"
    if not run.checksums.intact(failed):
        _ = ours.corpus  # All processes encode it, as a phase of its own.
        with run.phase("queries that fail"):
            find_failed(config, data, ours, run.path(failed))
        run.checksums.record(failed)
    own = _read(run.path(failed))
    run.reporter.say(f"{len(own)} queries have no relevant document above the rank")
    if not run.checksums.intact(name):
        with run.phase("easier passages"):
            path, most = run.path("work", place, "figret-texts.jsonl"), config.answer.max_characters
            texts = _texts(config.expansion, most, sampler, adapter, own, path) if own else {}
            _write(ours, own, texts, run.path(name))
        run.checksums.record(name)
    ours.release()
    given = _read(run.path(name))
    ids = [row["query_id"] for row in given]
    ordinary = {row["query_id"]: _triple(row) for row in own}
    turns = {FIGRET: [*map(_triple, given)], FIGRET_CONTROL: [ordinary[query] for query in ids]}
    retrievers = {}
    for row, triples in turns.items():
        params = _turn(run, models, ours.params, ids, triples, row)
        retrievers[row] = run_retriever(run, models, data.collection.corpus, params, row)
    return retrievers


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
    return [row for _, row in read_jsonl(path, {"query_id": str})]


def _triple(row: Mapping[str, Any]) -> Triple:
    return Triple(row["query"], tuple(row["pos"]), tuple(row["neg"]), margin=row.get("margin"))


def find_failed(
    config: Config, data: TrainingData, ours: CorpusRetriever, path: pathlib.Path
) -> None:
    """Writes the failed queries' ordinary triples, with negatives as `mining` has them.

    Its margins do not count: they trust the relevant document's score, which is what failed, and
    would leave out all that was found before it.
    """
    settings, corpus, failed = config.figret, ours.corpus, []

    def search(some: Sequence[str], queries: np.ndarray) -> list[str]:
        row_of = rows_of(data.collection.corpus)
        relevant = [[row_of[document] for document in data.positives(query)] for query in some]
        _, found = corpus.index.search(queries, min(len(corpus.ids), settings.rank))
        return [some[i] for i in failed_queries(found, relevant, settings.rank)]

    for some, queries in encoded_queries(ours, data, data.retriever_train):
        failed += ours.processes.once(functools.partial(search, some, queries))
    if failed := limit_queries(failed, settings.queries):
        mining = dataclasses.replace(config.mining, absolute_margin=None, relative_margin=None)
        drop = config.evaluation.drop_identical_ids
        mine_triples(mining, drop, ours, data, failed, path)
    else:
        ours.processes.once(lambda: write_jsonl(path, []))


def _texts(
    settings: ExpansionSettings,
    most: int,
    sampler: Sampler,
    adapter: Any,
    own: Sequence[Mapping[str, Any]],
    path: pathlib.Path,
) -> Texts:
    """(Query id, number) -> what the generator writes by that one of `PASSAGE_PROMPTS`."""
    drawn, rows = drawing(settings), {row["query_id"]: row for row in own}

    def requests(query: str) -> list[Request]:
        row = rows[query]
        messages = (
            fitted_message(PROMPTS[name], row["pos"][0], most, sampler.fits, row["query"])
            for name in PASSAGE_PROMPTS
        )
        return [
            Request(query, number, message, settings.temperature, **drawn)
            for number, message in enumerate(messages)
        ]

    asked = Requests([*rows], [len(PASSAGE_PROMPTS)] * len(rows), requests)
    return sample_texts(sampler, adapter, asked, path=path, purpose="easier passages")


def _write(
    ours: CorpusRetriever, own: Sequence[Mapping[str, Any]], texts: Texts, path: pathlib.Path
) -> None:
    """Writes the triples of failed queries, with the margins that the retriever gives them."""
    made = []
    for row in own:
        written = [texts[row["query_id"], number] for number in range(len(PASSAGE_PROMPTS))]
        made += [(row["query_id"], *of) for of in easier_triples(_triple(row), written).items()]
    passages = [*dict.fromkeys(text for *_, triple in made for text in triple.passages)]
    queries = [*dict.fromkeys(triple.query for *_, triple in made)]
    encoded = [(), ()]
    if made:
        with ours.reporter.progress("texts encoded", len(passages)) as advance:
            encoded = [
                ours.encode(queries, "query"),
                ours.encode(passages, "document", progress=advance),
            ]
    vectors = [
        dict(zip(t, v, strict=True)) for t, v in zip((queries, passages), encoded, strict=True)
    ]
    rows = (
        {"query_id": query, "aim": aim, "query": t.query, "pos": [*t.positives],
         "neg": [*t.negatives], "margin": t.margin}
        for query, aim, t in ((query, aim, with_margin(t, *vectors)) for query, aim, t in made)
    )  # fmt: skip
    ours.processes.once(lambda: write_jsonl(path, rows))
    counts = collections.Counter(aim for _, aim, _ in made)
    ours.reporter.say(f"triples: {', '.join(f'{n} {aim}' for aim, n in counts.items()) or 'none'}")


def _turn(
    run: Run, models: Models, start: Any, ids: Sequence[str], triples: Sequence[Triple], row: str
) -> Any:
    """A retriever's parameters after a turn on triples, the control's in no order."""
    config = run.config.contrastive
    unit = config.micro_batch or batch_divisor(models.contrastive_mesh)
    size = min(config.batch_size, len(triples) // unit * unit)
    if not size:
        run.reporter.say(f"{row}: {len(triples)} triples fill no batch; it is expandr's retriever")
        return start
    settings = dataclasses.replace(
        config,
        batch_size=size,
        negatives=max(1, config.negatives) * any(triple.negatives for triple in triples),
        curriculum=row == FIGRET,
        length_window=0,
    )
    phase = f"{row}-{run.config.rounds - 1}"
    with run.phase(row):
        return train_retriever(
            run, models, start, triples, phase=phase, round_=0, samples=0, ids=ids,
            settings=settings,
        )  # fmt: skip
