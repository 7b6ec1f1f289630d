"""What the candidates of a round are judged by: their vectors, the corpus, what is relevant."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.data.documents import rows_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.models.pooling import l2_normalize
from expandr_jax.rewards.group import SIDES, Group
from expandr_jax.rewards.ranks import ranks
from expandr_jax.rewards.search import Judged, judged_documents
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.query import fuse_each


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the candidates of some queries are judged by.

    Attributes:
        config: The whole config.
        groups: The queries with their candidates.
        data: Has the documents and the judgements.
        corpus: The documents as the retriever encodes them.
        queries: [queries, dim] vectors of the queries by the same retriever.
        candidates: [queries, candidates, dim] vectors of the candidates, 0 for an empty one.
        answers: [queries, dim] vectors of the self-answers.
    """

    config: Any
    groups: Sequence[Group]
    data: TrainingData
    corpus: Corpus
    queries: np.ndarray
    candidates: np.ndarray
    answers: np.ndarray

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """Document id -> its row in the corpus."""
        return rows_of(self.data.collection.corpus)

    @functools.cached_property
    def judged(self) -> Judged:
        """The queries' relevant documents."""
        return judged_documents(self.data, [group.query_id for group in self.groups], self.rows)

    @functools.cached_property
    def similarities(self) -> dict[str, np.ndarray]:
        """Cosines of the candidates to each of the two sides, [queries, candidates] each."""
        normalized = jax.jit(l2_normalize)
        positives = np.array([self.rows[group.positive_id] for group in self.groups])
        candidates, *sides = (
            np.asarray(normalized(x))
            for x in (self.candidates, self.corpus.vectors[positives], self.answers)
        )
        return {
            side: np.einsum("qcd,qd->qc", candidates, units)
            for side, units in zip(SIDES, sides, strict=True)
        }

    @functools.cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        """Ranks of the candidates among their query's by these, [queries, candidates] each."""
        return {side: ranks(similarity) for side, similarity in self.similarities.items()}

    @functools.cached_property
    def fused(self) -> np.ndarray:
        """[queries, candidates, dim] a query's vector with each of its candidates."""
        return fuse_each(
            self.queries,
            self.candidates,
            np.array([[bool(text) for text in group.texts] for group in self.groups]),
            query_weight=self.config.reward.query_weight,
            normalize=self.config.contrastive.normalize,
        )
