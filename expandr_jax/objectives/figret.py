"""FiGRet: what a generator writes for queries that a retriever fails, as triples to learn in turn.

For such a query it writes an easier passage that answers, one that answers half, and one that
answers among noise. Each aim sets the easier passage against something worse: relevance against
wrong documents, completeness against half of an answer, purity against a diluted one. The query's
own documents, on which the retriever failed, are the last of its triples. How easy each is, the
retriever itself says: by how much it already tells the two apart.

References:
    FiGRet, arXiv 2411.03957, from its description; prompts and margins are of our own.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.documents import rows_of
from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.data.triples import Triple
from expandr_jax.expansion.expand import drawing
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.expansion.sampled import Texts, sample_texts
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import fitted_message
from expandr_jax.files.records import write_jsonl
from expandr_jax.generation.requests import Request, Requests
from expandr_jax.generation.sampler import Sampler
from expandr_jax.objectives.negatives import encoded_queries, mine_triples
from expandr_jax.objectives.settings import MiningSettings
from expandr_jax.vectors.corpus import CorpusRetriever

PASSAGE_PROMPTS = ("figret-easier", "figret-half", "figret-noise")  # Names in `PROMPTS`.


def failed_queries(found: np.ndarray, relevant: Sequence[Collection[int]], rank: int) -> list[int]:
    """The queries none of whose relevant documents is among the first so many that were found.

    Args:
        found: [queries, depth] documents, best first, as `Index.search` returns them.
        relevant: The relevant documents of each query.
        rank: How many of the first count.
    """
    first = np.asarray(found)[:, :rank].tolist()
    return [i for i, of in enumerate(relevant) if set(of).isdisjoint(first[i])]


def easier_triples(own: Triple, written: Sequence[str]) -> dict[str, Triple]:
    """A query's triples by their aims.

    Args:
        own: The query with its relevant documents, and wrong ones as negatives, if it has any.
        written: The text of each of `PASSAGE_PROMPTS`; "" where the generator wrote nothing. A
            triple that needs such a text, or would have the same one twice, is left out.
    """
    easier, *worse = written
    found = {}
    if easier and own.negatives:
        found["relevance"] = Triple(own.query, (easier,), own.negatives)
    for aim, text in zip(("completeness", "purity"), worse, strict=True):
        if easier and text and text != easier:
            found[aim] = Triple(own.query, (easier,), (text,))
    return found | ({"judged": own} if own.negatives else {})


def with_margin(
    triple: Triple, queries: Mapping[str, np.ndarray], passages: Mapping[str, np.ndarray]
) -> Triple:
    """The triple with the margin that a retriever's vectors of its texts, [dim] each, give it."""
    scores = (float(queries[triple.query] @ passages[text]) for text in triple.passages)
    scored = dataclasses.replace(triple, teacher_scores=tuple(scores))
    return dataclasses.replace(triple, margin=scored.ease)


def find_failed(
    rank: int,
    most: int,
    mining: MiningSettings,
    drop_identical_ids: bool,
    data: TrainingData,
    ours: CorpusRetriever,
    path: pathlib.Path,
) -> None:
    """Writes the failed queries' ordinary triples, with negatives as section `mining` has them.

    Its margins do not count: they trust the relevant document's score, which is what failed, and
    would leave out all that was found before it. All processes call it together.

    Args:
        rank, most: The rank that no relevant document has, and how many queries are taken, 0 all:
            the config's section `figret`.
        mining, drop_identical_ids: As of `mine_triples`.
        data: Has the queries of step A.
        ours: The retriever, whose corpus is encoded.
        path: The file.
    """
    corpus, failed = ours.corpus, []

    def search(some: Sequence[str], queries: np.ndarray) -> list[str]:
        row_of = rows_of(data.collection.corpus)
        relevant = [[row_of[document] for document in data.positives(query)] for query in some]
        _, found = corpus.index.search(queries, min(len(corpus.ids), rank))
        return [some[i] for i in failed_queries(found, relevant, rank)]

    for some, queries in encoded_queries(ours, data, data.retriever_train):
        failed += ours.processes.once(functools.partial(search, some, queries))
    if failed := limit_queries(failed, most):
        mining = dataclasses.replace(mining, absolute_margin=None, relative_margin=None)
        mine_triples(mining, drop_identical_ids, ours, data, failed, path)
    else:
        ours.processes.once(lambda: write_jsonl(path, []))


def triple_of(row: Mapping[str, Any]) -> Triple:
    """The triple of a line that `find_failed` or `write_easier` has written."""
    return Triple(row["query"], tuple(row["pos"]), tuple(row["neg"]), margin=row.get("margin"))


def easier_passages(
    settings: ExpansionSettings,
    most_characters: int,
    sampler: Sampler,
    adapter: Any,
    failed: Sequence[Mapping[str, Any]],
    path: pathlib.Path,
) -> Texts:
    """(Query id, number) -> what the generator writes by that one of `PASSAGE_PROMPTS`.

    Args:
        settings: How it is drawn: the config's section `expansion`.
        most_characters: Characters of the relevant document in a prompt, at most.
        sampler, adapter: The generator.
        failed: Lines that `find_failed` has written.
        path: The journal of the texts.
    """
    drawn, rows = drawing(settings), {row["query_id"]: row for row in failed}

    def requests(query: str) -> list[Request]:
        row = rows[query]
        messages = (
            fitted_message(
                PROMPTS[name], row["pos"][0], most_characters, sampler.fits, row["query"]
            )
            for name in PASSAGE_PROMPTS
        )
        return [
            Request(query, number, message, settings.temperature, **drawn)
            for number, message in enumerate(messages)
        ]

    asked = Requests([*rows], [len(PASSAGE_PROMPTS)] * len(rows), requests)
    return sample_texts(sampler, adapter, asked, path=path, purpose="easier passages")


def write_easier(
    ours: CorpusRetriever,
    failed: Sequence[Mapping[str, Any]],
    texts: Texts,
    path: pathlib.Path,
) -> None:
    """Writes the triples of failed queries, with the margins that the retriever gives them.

    All processes call it together; `texts` are `easier_passages`.
    """
    made = []
    for row in failed:
        written = [texts[row["query_id"], number] for number in range(len(PASSAGE_PROMPTS))]
        made += [(row["query_id"], *of) for of in easier_triples(triple_of(row), written).items()]
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
