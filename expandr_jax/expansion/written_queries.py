"""Queries that the generator writes for documents: sampled, sorted out, and kept in a file."""

import collections
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from expandr_jax.data.documents import ids_of
from expandr_jax.data.generated import drawn_documents, generated_names, generated_rows
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import expansion_requests
from expandr_jax.expansion.prompts import DOCUMENT_PROMPTS
from expandr_jax.expansion.sampled import MadeWhenAsked, sample_texts
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import document_message
from expandr_jax.files.records import read_jsonl, write_jsonl
from expandr_jax.generation.sampler import Sampler

# What each line of the file has.
GENERATED_FIELDS = {"query_id": str, "document_id": str, "query": str, "left_out": str}
QUERY_PROMPT = "d2q"  # What the generator is asked of a document.


def write_queries(
    data: TrainingData,
    sampler: Sampler,
    settings: ExpansionSettings,
    tested: Callable[[], Collection[str]],
    *,
    documents: int,
    each: int,
    most_characters: int,
    seed: int,
    journal: pathlib.Path,
    path: pathlib.Path,
) -> None:
    """Has queries written for documents, by the generator before training; says what is left out.

    All processes call it together.

    Args:
        data: Has the documents, and the queries that are trained on already.
        sampler: The generator, and how it samples.
        settings: How texts are drawn: the config's section `expansion`.
        tested: Gives the queries that none may be, or nearly be; process 0 asks.
        documents: How many documents are drawn.
        each: Queries of each of them.
        most_characters: Characters of a document in a prompt, at most.
        seed: That by which documents are drawn.
        journal: Where the sampled texts are kept.
        path: The file of the queries, which has those that are left out, too.
    """
    corpus = data.collection.corpus
    drawn = drawn_documents(ids_of(corpus), documents, seed)
    messages = MadeWhenAsked(
        drawn,
        lambda document: document_message(
            QUERY_PROMPT, corpus[document], most_characters, sampler.fits
        ),
    )
    written = sample_texts(
        sampler,
        None,
        expansion_requests(settings, messages, each),
        path=journal,
        purpose="queries of documents",
    )

    def write() -> dict[str, int]:
        held_out = tested()
        trained = data.queries([*data.retriever_train, *data.generator_train])
        asked = DOCUMENT_PROMPTS[QUERY_PROMPT].message(document="")
        rows = _rows_of(path, generated_names(written, QUERY_PROMPT))
        if rows is None:
            rows = generated_rows(written, QUERY_PROMPT, trained, held_out, asked)
            write_jsonl(path, rows)
        return dict(sorted(collections.Counter(row["left_out"] for row in rows).items()))

    counts = sampler.processes.once(write)
    dropped = "".join(f"; {count} left out: {why}" for why, count in counts.items() if why)
    sampler.reporter.say(f"{counts.get('', 0)} queries written for {len(drawn)} documents{dropped}")


def kept_queries(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Rows of such a file that are not left out."""
    return (row for _, row in read_jsonl(path, GENERATED_FIELDS) if not row["left_out"])


def generated_queries(path: pathlib.Path) -> dict[str, str]:
    """Query id -> query, of `kept_queries`; none where there is no file."""
    return {row["query_id"]: row["query"] for row in kept_queries(path)} if path.exists() else {}


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
