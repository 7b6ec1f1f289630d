"""What systems are ranked by: what is searched, and what was written for the queries."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expandr_jax.expansion.expand import by_sample
from expandr_jax.expansion.strategies import Strategy
from expandr_jax.ranking.systems import OURS, QUERY_TOWERS, SPLADE, System
from expandr_jax.search import Index
from expandr_jax.vectors.corpus import CorpusRetriever


@dataclasses.dataclass(frozen=True)
class Expansions:
    """What was written for the queries of a split.

    Attributes:
        strategy: What becomes of it.
        texts: [queries][asks][samples], "" where nothing was said.
        log_probs: The same, the mean log-probability of each text's tokens as they were sampled;
            None where nobody kept them.
    """

    strategy: Strategy
    texts: Sequence[Sequence[Sequence[str]]]
    log_probs: Sequence[Sequence[Sequence[float]]] | None = None

    @functools.cached_property
    def by_sample(self) -> list[list[str]]:
        """[queries][texts], in the order of `by_sample`."""
        return [by_sample(asks) for asks in self.texts]

    def columns(self, count: int) -> list[int]:
        """Which of `by_sample` the first so many are, those of the first `Ask` first."""
        asks = len(self.strategy.asks)
        return [column for ask in range(asks) for column in range(ask, count, asks)]

    def used_log_probs(self, number: int, columns: Sequence[int]) -> list[float] | None:
        """What `log_probs` has of the texts of a query, by number, in some columns; "" has none."""
        if self.log_probs is None:
            return None
        told, texts = by_sample(self.log_probs[number]), self.by_sample[number]
        return [told[column] for column in columns if texts[column]]


@dataclasses.dataclass(frozen=True)
class Searches:
    """What the leaves of systems search, each for the corpus as it is or as it is expanded.

    Attributes:
        bm25: How documents are expanded, or None, to their index.
        dense: Name of a retriever, and the same, to that with its corpus encoded; called whenever
            it is needed. Process 0 alone searches it.
        corpus: Document id -> text.
        sparse: As `bm25`, to what searches for texts by the sparse encoder, with its `search`.
        texts: How documents are expanded, or None, to what BM25's index has of each, by row; None:
            the corpus as it is.
    """

    bm25: Callable[[str | None], Index]
    dense: Callable[[str, str | None], CorpusRetriever]
    corpus: Mapping[str, str]
    sparse: Callable[[str | None], Any] | None = None
    texts: Callable[[str | None], Sequence[str]] | None = None

    def by_texts(self, leaf: System) -> Any:
        """What a leaf searches for texts: BM25's index, or the corpus of a sparse encoder."""
        return (self.sparse if leaf.retriever == SPLADE else self.bm25)(leaf.documents)


class OneAtATime:
    """Retrievers with their corpus encoded, of which one is in memory, not those of all.

    Args:
        retrievers: Name, as `System` has it -> retriever, with the run's own corpus.
        elsewhere: (parameters, name) -> the same with the corpus of a further collection; None: the
            run's own is searched.
        dataset: The collection's name.
    """

    def __init__(
        self,
        retrievers: Mapping[str, CorpusRetriever],
        elsewhere: Callable[[Any, str], CorpusRetriever] | None,
        dataset: str,
    ):
        self._retrievers, self._elsewhere, self._dataset = retrievers, elsewhere, dataset
        self._name, self._open = "", None

    def __call__(self, name: str) -> CorpusRetriever:
        """The retriever of this name; all processes call it together."""
        if name != self._name:
            self.release()
            whose = OURS if name in QUERY_TOWERS else name  # The documents that are searched.
            found = self._retrievers[whose]
            if self._elsewhere:
                found = self._elsewhere(found.params, f"{self._dataset}/{whose}")
            if whose != name:
                params = self._retrievers[name].params
                found = dataclasses.replace(found, params=params, documents=found)
            _ = found.corpus  # All processes encode it together.
            self._name, self._open = name, found
        return self._open

    def release(self) -> None:
        """Lets go of what is in memory."""
        if self._open is not None:
            self._open.release()
        self._name, self._open = "", None
