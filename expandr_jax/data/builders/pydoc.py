"""The docstrings of installed packages, as expandr_jax/data/pydoc.py harvests them."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import tensorflow_datasets as tfds

from expandr_jax.data.builders.prepare import Row, TextBuilder
from expandr_jax.data.pydoc import RULE, Shares, harvest, source_hashes

_SHARES = Shares()


class Pydoc(TextBuilder, skip_registration=True):
    """Queries with their documents; the splits are those of `Shares`.

    Args:
        packages: "name==version".
        data_dir: The root of all prepared sets.
        shares: Of the splits.

    Raises:
        UserError: A package is missing or has another version.
    """

    FIELDS: ClassVar = {
        name: tfds.features.Text() for name in ("query_id", "query", "document_id", "document")
    }

    def __init__(
        self, packages: Sequence[str], *, data_dir: str | os.PathLike, shares: Shares = _SHARES
    ):
        self._packages, self._shares = tuple(packages), shares
        identity = {
            "packages": source_hashes(packages),
            "shares": dataclasses.asdict(shares),
            "rule": RULE,
        }
        super().__init__(data_dir=data_dir, label="packages", identity=identity)

    def splits(self) -> Mapping[str, Iterable[Row]]:
        """retriever_train, generator_train, dev and test."""
        result = harvest(self._packages, shares=self._shares)
        qrels = result.collection.qrels
        ids = {
            "retriever_train": result.retriever_train,
            "generator_train": result.generator_train,
            "dev": list(qrels["dev"]),
            "test": list(qrels["test"]),
        }
        judged = {
            query: document for split in qrels.values() for query, (document,) in split.items()
        }
        collection = result.collection
        return {
            split: [
                {
                    "query_id": query,
                    "query": collection.queries[query],
                    "document_id": judged[query],
                    "document": collection.corpus[judged[query]],
                }
                for query in queries
            ]
            for split, queries in ids.items()
        }
