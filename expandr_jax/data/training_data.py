"""A collection and who trains on which of its queries."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from expandr_jax.data.beir import Collection


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The text that a run trains and tests on.

    Attributes:
        collection: Corpus, queries, and judgements of "train", "dev" and "test".
        retriever_train: Ids of the queries of step A.
        generator_train: Ids of the queries of step B; apart from the former.
        source: What data/SOURCE.json records of where all of it comes from.
    """

    collection: Collection
    retriever_train: list[str]
    generator_train: list[str]
    source: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    def queries(self, ids: Sequence[str]) -> list[str]:
        """Texts of queries."""
        return [self.collection.queries[i] for i in ids]

    def positives(self, query_id: str, split: str = "train") -> list[str]:
        """Ids of a query's relevant documents, by falling grade, then by id."""
        grades = self.collection.qrels[split][query_id]
        known = {d: g for d, g in grades.items() if g > 0 and d in self.collection.corpus}
        return sorted(known, key=lambda d: (-known[d], d))

    def negatives(self, query_id: str) -> list[str]:
        """Texts of the documents that are judged irrelevant to a training query, by id."""
        grades, corpus = self.collection.qrels["train"][query_id], self.collection.corpus
        irrelevant = sorted(d for d, grade in grades.items() if grade <= 0 and d in corpus)
        return [corpus[document] for document in irrelevant]

    def left_out(self, query_id: str, drop_identical_ids: bool) -> list[str]:
        """Ids of the documents that leave a query's rankings: what is excluded, or has its id."""
        out = {*self.collection.excluded.get(query_id, ())}
        out |= {query_id} if drop_identical_ids else set()
        return sorted(document for document in out if document in self.collection.corpus)

    def positive(self, query_id: str) -> str:
        """The first of `positives`."""
        return self.positives(query_id)[0]


def limit_queries(ids: list[str], most: int) -> list[str]:
    """At most `most` ids (0: all), picked by hash so that the choice depends on the ids alone."""
    if most and len(ids) > most:
        ids = sorted(ids, key=lambda i: hashlib.sha256(i.encode()).digest())[:most]
    return sorted(ids)
