"""Hard negatives for step A: documents that the current retriever ranks high, not relevant ones."""

import pathlib
from collections.abc import Sequence

import numpy as np

from expandr_jax.config import Config
from expandr_jax.data.documents import rows_of, texts_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl, write_jsonl
from expandr_jax.mining import mine_negatives, triple_rows
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever


def check_negatives(config: Config, data: TrainingData) -> None:
    """Refuses, before the models are loaded, to train on negatives that are nowhere."""
    count = config.contrastive.negatives
    if not count or config.mining.per_query or any(map(data.negatives, data.retriever_train)):
        return
    raise UserError(
        f"contrastive.negatives is {count}, but no training query has a document that is judged "
        "wrong; set it to 0, or mine some with mining.per_query"
    )


def training_negatives(
    run: Run, retriever: CorpusRetriever, data: TrainingData, round_: int
) -> dict[str, list[str]]:
    """Hard negatives of a round of step A, as `negatives_of`; round-R/triples.jsonl has them."""
    what = f"hard negatives, round {round_}"
    return negatives_of(
        run, retriever, data, data.retriever_train, f"round-{round_}/triples.jsonl", what
    )


def negatives_of(
    run: Run,
    retriever: CorpusRetriever,
    data: TrainingData,
    ids: Sequence[str],
    name: str,
    what: str,
) -> dict[str, list[str]]:
    """Hard negatives of some training queries; none if the config asks for none.

    Where they are to be mined, the corpus is searched for each query, unexpanded, by the retriever
    that training begins with, in a phase called `what`, and the file `name` of the workdir written;
    where not, they are those that the data name.

    Returns:
        Query id -> texts of its negatives, hardest first.
    """
    if not run.config.contrastive.negatives:
        return {}
    if not run.config.mining.per_query:
        return {query: data.negatives(query) for query in ids}
    if not run.checksums.intact(name):
        _ = retriever.corpus  # All processes encode it, as a phase of its own.
        with run.phase(what):
            mine_triples(run, retriever, data, ids, run.path(name))
        retriever.release()
        run.checksums.record(name)
    fields = {"query_id": str, "neg": list}
    return {row["query_id"]: row["neg"] for _, row in read_jsonl(run.path(name), fields)}


def mine_triples(
    run: Run,
    retriever: CorpusRetriever,
    data: TrainingData,
    ids: Sequence[str],
    path: pathlib.Path,
) -> None:
    """Writes a file of triples, with negatives that a retriever mines for some training queries.

    All processes call it together; the retriever has encoded the corpus.
    """
    config, corpus = run.config.mining, retriever.corpus
    with run.reporter.progress("training queries encoded", len(ids)) as advance:
        queries = retriever.encode(data.queries(ids), "query", progress=advance)

    def search() -> None:
        row_of = rows_of(data.collection.corpus)
        relevant = [[row_of[document] for document in data.positives(query)] for query in ids]
        drop = run.config.evaluation.drop_identical_ids
        known = [  # What leaves a query's rankings is no negative of it.
            rows + [row_of[document] for document in data.left_out(query, drop)]
            for query, rows in zip(ids, relevant, strict=True)
        ]
        scores, found = corpus.index.search(queries, min(len(corpus.ids), config.depth))
        own = corpus.vectors[[documents[0] for documents in relevant]]
        texts = texts_of(data.collection.corpus)
        mined = mine_negatives(
            scores,
            found,
            np.sum(queries * own, axis=1),
            known,
            texts,
            count=max(1, config.per_query),
            first=config.first,
            absolute_margin=config.absolute_margin,
            relative_margin=config.relative_margin,
        )
        rows = zip(ids, triple_rows(data.queries(ids), relevant, mined, texts), strict=True)
        named = ({"query_id": query, **row} for query, row in rows if row["pos"])
        write_jsonl(path, named)
        count = sum(map(len, mined))
        run.reporter.say(f"{count} negatives; {sum(not m for m in mined)} queries have none")

    run.processes.once(search)
