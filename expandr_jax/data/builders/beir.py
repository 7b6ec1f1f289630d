"""A retrieval collection, in any layout that expandr_jax/data/beir.py reads.

Documents, queries and judgements have different fields, so each is a set of its own. Nothing is
left out: a document may have a query's id (ArguAna), a judged one may be missing.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar, Literal

import numpy as np
import tensorflow_datasets as tfds

from expandr_jax.data.archive import Files
from expandr_jax.data.beir import find_collections, read_splits, read_texts, source_hashes
from expandr_jax.data.builders.prepare import Progress, Row, TextBuilder

_TEXT = tfds.features.Text()
ALL = "texts"  # The one split of documents and of queries.


class _BeirBuilder(TextBuilder, skip_registration=True):
    def __init__(self, files: Files, *, data_dir: str | os.PathLike, label: str):
        self._files = files
        super().__init__(data_dir=data_dir, label=label, identity={"files": source_hashes(files)})


class BeirCorpus(_BeirBuilder, skip_registration=True):
    """The documents: id, and title + " " + text."""

    FIELDS: ClassVar = {"id": _TEXT, "text": _TEXT}

    def splits(self) -> Mapping[str, Iterable[Row]]:
        """One split, `ALL`."""
        return {ALL: _texts(self._files, "corpus")}


class BeirQueries(_BeirBuilder, skip_registration=True):
    """The queries, judged or not."""

    FIELDS: ClassVar = BeirCorpus.FIELDS

    def splits(self) -> Mapping[str, Iterable[Row]]:
        """One split, `ALL`."""
        return {ALL: _texts(self._files, "queries")}


class BeirJudgements(_BeirBuilder, skip_registration=True):
    """The judgements, a row for each query and document."""

    FIELDS: ClassVar = {"query_id": _TEXT, "document_id": _TEXT, "grade": np.int32}

    def splits(self) -> Mapping[str, Iterable[Row]]:
        """The collection's own."""
        queries = {key for key, _ in read_texts(self._files, "queries")}
        qrels = read_splits(self._files, queries)
        return {
            split: [
                {"query_id": query, "document_id": document, "grade": grade}
                for query, judged in judgements.items()
                for document, grade in judged.items()
            ]
            for split, judgements in qrels.items()
        }


@dataclasses.dataclass(frozen=True)
class PreparedBeir:
    """A collection whose three sets are prepared."""

    corpus: tfds.core.DatasetBuilder
    queries: tfds.core.DatasetBuilder
    judgements: tfds.core.DatasetBuilder


def prepare_beir(
    path: str | os.PathLike, data_dir: str | os.PathLike, progress: Progress | None = None
) -> dict[str, PreparedBeir]:
    """Prepares the collection, or the several (CQADupStack's twelve), of a directory or zip.

    Args:
        path: As for `find_collections`.
        data_dir: The root of all prepared sets.
        progress: Called with the number of rows written since its last call.

    Returns:
        Name of the collection -> its sets.

    Raises:
        UserError: A file is missing or a line is wrong, as `read_beir` says it.
    """
    builders = (BeirCorpus, BeirQueries, BeirJudgements)
    return {
        name: PreparedBeir(
            *(b(files, data_dir=data_dir, label=name).prepare(progress) for b in builders)
        )
        for name, files in find_collections(path).items()
    }


def _texts(files: Files, kind: Literal["corpus", "queries"]) -> Iterator[Row]:
    return ({"id": key, "text": text} for key, text in read_texts(files, kind))
