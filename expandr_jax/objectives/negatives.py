"""Hard negatives of training queries: documents that a retriever ranks high, not relevant ones."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.documents import rows_of, texts_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import open_jsonl
from expandr_jax.mining import QUERIES_AT_ONCE, mine_negatives, triple_rows
from expandr_jax.objectives.settings import MiningSettings
from expandr_jax.vectors.corpus import Corpus, CorpusRetriever


def check_negatives(count: int, settings: MiningSettings, data: TrainingData) -> None:
    """Refuses, before the models are loaded, to train on negatives that are nowhere.

    `count` is how many a query is to have, the config's `contrastive.negatives`.
    """
    if not count or settings.per_query or any(map(data.negatives, data.retriever_train)):
        return
    raise UserError(
        f"contrastive.negatives is {count}, but no training query has a document that is judged "
        "wrong; set it to 0, or mine some with mining.per_query"
    )


def mine_triples(
    settings: MiningSettings,
    drop_identical_ids: bool,
    retriever: CorpusRetriever,
    data: TrainingData,
    ids: Sequence[str],
    path: pathlib.Path,
) -> None:
    """Writes a file of triples, with negatives that a retriever mines for some training queries.

    All processes call it together; the retriever has encoded the corpus.
    """
    processes, counts = retriever.processes, (0, 0)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(open_jsonl(path)) if processes.is_main else None
        for some, queries in encoded_queries(retriever, data, ids):
            asked = data, retriever.corpus, some, queries
            mine = functools.partial(_mined, settings, drop_identical_ids, *asked, write)
            counts = [a + b for a, b in zip(counts, processes.once(mine), strict=True)]
    found, without = counts
    retriever.reporter.say(f"{found} negatives; {without} queries have none")


def encoded_queries(
    retriever: CorpusRetriever, data: TrainingData, ids: Sequence[str]
) -> Iterator[tuple[Sequence[str], np.ndarray]]:
    """So many training queries at a time, and in process 0 their vectors; all encode together."""
    with retriever.reporter.progress("training queries encoded", len(ids)) as advance:
        for first in range(0, len(ids), QUERIES_AT_ONCE):
            some = ids[first : first + QUERIES_AT_ONCE]
            own = {"progress": advance, "main_alone": True}
            yield some, retriever.encode(data.queries(some), "query", **own)


def _mined(
    settings: MiningSettings,
    drop_identical_ids: bool,
    data: TrainingData,
    corpus: Corpus,
    ids: Sequence[str],
    queries: np.ndarray,
    write: Callable[[Iterable[Mapping[str, Any]]], None],
) -> tuple[int, int]:
    """Writes the triples of queries: how many negatives they have, and how many have none."""
    row_of = rows_of(data.collection.corpus)
    relevant = [[row_of[document] for document in data.positives(query)] for query in ids]
    known = [  # What leaves a query's rankings is no negative of it.
        rows + [row_of[document] for document in data.left_out(query, drop_identical_ids)]
        for query, rows in zip(ids, relevant, strict=True)
    ]
    scores, found = corpus.index.search(queries, min(len(corpus.ids), settings.depth))
    own = corpus.vectors[[documents[0] for documents in relevant]]
    texts = texts_of(data.collection.corpus)
    mined = mine_negatives(
        scores,
        found,
        np.sum(queries * own, axis=1),
        known,
        texts,
        count=max(1, settings.per_query),
        first=settings.first,
        absolute_margin=settings.absolute_margin,
        relative_margin=settings.relative_margin,
    )
    rows = zip(ids, triple_rows(data.queries(ids), relevant, mined, texts), strict=True)
    write({"query_id": query, **row} for query, row in rows if row["pos"])
    return sum(map(len, mined)), sum(not m for m in mined)
