"""The evidence that rewards read: candidates' vectors, searches, judgements."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from expandr_jax.data.documents import rows_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.strategies import Strategy
from expandr_jax.models.pooling import l2_normalize
from expandr_jax.rewards.answers import Answers
from expandr_jax.rewards.functions import RewardFunction, function_rewards
from expandr_jax.rewards.group import COMPARED_WITH, Group
from expandr_jax.rewards.ranks import ranks
from expandr_jax.rewards.search import Judged, judged_documents
from expandr_jax.search import Index
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.query import fuse_each

if TYPE_CHECKING:
    from expandr_jax.rewards.registry import RewardSettings

_normalized = jax.jit(l2_normalize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardContext:
    """What all candidates of a round are judged by. No reward looks at two queries at once.

    Attributes:
        settings: The config's section `reward`.
        seed: Seed of all draws.
        strategy: Says what BM25 is asked for a query with a candidate.
        drop_identical_ids: A document with a query's id leaves its rankings.
        data: Has the documents and the judgements.
        corpus: The documents as the retriever encodes them; None where no reward with a weight
            looks at vectors, as `registry.needs_vectors` says.
        words: Opens BM25's index of the documents, when a reward first searches it.
        queries: Ids of all queries that have candidates.
        block: How many of them are judged together, at most.
        most_tokens: Longest candidate that was asked for, in tokens.
        split: Which judgements are theirs.
        functions: Those of `reward.functions`, imported.
    """

    settings: "RewardSettings"
    seed: int
    strategy: Strategy
    drop_identical_ids: bool
    data: TrainingData
    corpus: Corpus | None
    words: Callable[[], Index]
    queries: Sequence[str]
    block: int
    most_tokens: int = 0
    split: str = "train"
    functions: Sequence[RewardFunction] = ()

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """Document id -> its row in the corpus."""
        return rows_of(self.data.collection.corpus)

    @functools.cached_property
    def most_relevant(self) -> int:
        """How many documents are relevant to a query, at most."""
        positives = (self.data.positives(query, self.split) for query in self.queries)
        return max(map(len, positives), default=1)

    @functools.cached_property
    def answers(self) -> Answers:
        """Which documents hold answers to which queries."""
        return Answers(self.data.collection)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What the candidates of a block of queries are judged by.

    Attributes:
        context: What they have in common with others.
        groups: The queries with their candidates.
        queries: [queries, dim] vectors of the queries by the same retriever; None where the context
            has no corpus.
        candidates: [queries, candidates, dim] vectors of the candidates, 0 for an empty one;
            likewise.
        answers: [queries, dim] vectors of the self-answers; None where there are none.
    """

    context: RewardContext
    groups: Sequence[Group]
    queries: np.ndarray | None = None
    candidates: np.ndarray | None = None
    answers: np.ndarray | None = None

    @property
    def each(self) -> int:
        """How many candidates a query has."""
        return len(self.groups[0].candidates)

    @functools.cached_property
    def judged(self) -> Judged:
        """The queries' relevant documents."""
        own, context = [group.query_id for group in self.groups], self.context
        # As wide for a block as for all, so that sums over them are rounded alike.
        how = {
            "width": context.most_relevant,
            "split": context.split,
            "drop_identical_ids": context.drop_identical_ids,
        }
        return judged_documents(context.data, own, context.rows, **how)

    @property
    def depth(self) -> int:
        """For how many documents the corpus is searched: those that count, and what is left out."""
        return self.context.settings.depth + self.judged.left_out.shape[1]

    def given_by(self, function: RewardFunction) -> np.ndarray:
        """What a function of the user's own gives for the candidates, [queries, candidates]."""
        qrels, groups = self.context.data.collection.qrels[self.context.split], self.groups
        return function_rewards(
            function,
            [group.query_id for group in groups],
            [group.query for group in groups],
            [group.texts for group in groups],
            [qrels[group.query_id] for group in groups],
            self.context.settings.function_seconds,
        )

    @functools.cached_property
    def similarities(self) -> dict[str, np.ndarray]:
        """Cosines of the candidates to each side that has vectors, [queries, candidates] each."""
        if self.candidates is None:
            return {}
        rows = self.context.rows
        positives = np.array([rows[group.positive_id] for group in self.groups])
        sides = dict(
            zip(COMPARED_WITH, (self.context.corpus.vectors[positives], self.answers), strict=True)
        )
        candidates = self.in_one_shape(_normalized, self.candidates)
        return {
            side: np.einsum("qcd,qd->qc", candidates, self.in_one_shape(_normalized, vectors))
            for side, vectors in sides.items()
            if vectors is not None
        }

    @functools.cached_property
    def ranks(self) -> dict[str, np.ndarray]:
        """Ranks of the candidates among their query's by these, [queries, candidates] each."""
        return {side: ranks(similarity) for side, similarity in self.similarities.items()}

    @functools.cached_property
    def fused(self) -> np.ndarray:
        """[queries, candidates, dim] a query's vector with each of its candidates."""
        present = np.array([[bool(text) for text in group.texts] for group in self.groups])
        weight = self.context.settings.query_weight
        return self.fuse(self.queries, self.candidates, present, query_weight=weight)

    def fuse(self, *vectors: np.ndarray, query_weight: float) -> np.ndarray:
        """`fuse_each` as the corpus is searched."""
        how = {"query_weight": query_weight, "normalize": self.context.corpus.normalize}
        return self.in_one_shape(functools.partial(fuse_each, **how), *vectors)

    def in_one_shape(self, function: Callable[..., Any], *arrays: np.ndarray) -> np.ndarray:
        """A function of this block's rows, compiled once for all blocks.

        The last block is filled up with zeros: another shape would be rounded otherwise.
        """
        size = min(self.context.block, len(self.context.queries))
        lacking = max(0, size - len(self.groups))
        if lacking:
            arrays = [np.pad(x, [(0, lacking)] + [(0, 0)] * (x.ndim - 1)) for x in arrays]
        return np.asarray(function(*arrays))[: len(self.groups)]


def evidence_of(
    context: RewardContext,
    groups: Sequence[Group],
    queries: np.ndarray,
    candidates: np.ndarray,
    answers: np.ndarray | None = None,
) -> Evidence:
    """Evidence of texts that were encoded one after the other, [texts, dim] the candidates'."""
    texts = [text for group in groups for text in group.texts]
    # An empty candidate has nothing in common with anything: its vector is zero.
    candidates = np.where([[bool(text)] for text in texts], candidates, 0.0)
    shape = len(groups), -1, candidates.shape[-1]
    return Evidence(context, groups, queries, candidates.reshape(shape), answers)
