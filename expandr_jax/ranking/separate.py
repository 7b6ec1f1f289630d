"""Leaves whose query and texts are each searched for themselves, where `expansion.combine` says."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.documents import ids_of
from expandr_jax.expansion.combine import (
    Found,
    combined,
    found_by_vectors,
    found_by_words,
    text_weights,
)
from expandr_jax.metrics import RunScores
from expandr_jax.ranking.choices import Choice
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.ranking.sources import Expansions, Searches
from expandr_jax.ranking.stages import WEIGHINGS
from expandr_jax.ranking.systems import BM25, System
from expandr_jax.search import search_named, words_of
from expandr_jax.vectors.query import EncodedQueries, separate

QUERIES_AT_ONCE = 512  # All that is found for them and their texts is in memory.


class SeparateSearches:
    """Ranks such leaves for the queries of one split, in process 0; arguments are `Ranker`'s."""

    def __init__(
        self,
        ids: Sequence[str],
        searches: Searches,
        settings: EvaluationSettings,
        excluded: Mapping[str, Collection[str]] | None,
    ):
        self._ids, self._searches, self._settings = ids, searches, settings
        self._excluded = excluded
        self._found: tuple[Any, list[Found]] = None, []  # By the searches that were made last.

    def rank(
        self,
        leaf: System,
        choice: Choice,
        expansions: Expansions,
        used: Sequence[tuple[str, list[str]]],
        encoded: EncodedQueries | None,
    ) -> RunScores:
        """The run of a leaf.

        Args:
            leaf, choice: What is ranked, and how it uses its texts.
            expansions: Its texts.
            used: Each query with those of them that are used.
            encoded: Their vectors; None for BM25.
        """
        columns = expansions.columns(choice.samples)
        weights = []
        for query, texts in used:
            weight = choice.query_weight
            if encoded is not None:
                weight = expansions.strategy.dense(query, texts, weight).query_weight
            weights.append(text_weights(weight, len(texts)))

        def find(part: slice, k: int) -> list[Found]:
            if encoded is None:
                return found_by_words(
                    self._words(leaf), [[q, *texts] for q, texts in used[part]], k
                )
            return self._by_vectors(leaf, encoded, columns, part, k)

        def search(part: slice, k: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
            key = leaf.name, choice.samples, part.start
            if self._found[0] != key:  # Whatever they weigh.
                self._found = key, find(part, k)
            return combined(self._found[1], weights[part], choice.combine, k)

        run: dict[str, dict[str, float]] = {}
        for start in range(0, len(used), QUERIES_AT_ONCE):
            part = slice(start, start + QUERIES_AT_ONCE)
            run |= search_named(
                search,
                self._ids[part],
                part,
                ids_of(self._searches.corpus),
                self._settings.depth,
                drop_identical_ids=self._settings.drop_identical_ids,
                excluded=self._excluded,
            )
        return run

    def _by_vectors(
        self, leaf: System, encoded: EncodedQueries, columns: Sequence[int], part: slice, k: int
    ) -> list[Found]:
        """What is found for some of the queries and each of their texts."""
        retriever = self._searches.dense(leaf.retriever, leaf.documents)
        corpus = retriever.corpus
        each = encoded.queries, encoded.expansions[:, columns], encoded.present[:, columns]
        asked = [
            separate(query, texts[present], retriever.normalize)
            for query, texts, present in zip(*(values[part] for values in each), strict=True)
        ]
        return found_by_vectors(corpus.evaluated.search, corpus.vectors, asked, k)

    def _words(self, leaf: System) -> Callable[[Sequence[str], int], Any]:
        """BM25's search for texts, whose words it weighs as the leaf has it."""
        index, weigh = self._searches.by_texts(leaf), WEIGHINGS[leaf.weighing]
        if leaf.weighing == BM25:
            return index.search  # Their words count alike.
        return lambda texts, k: index.search_weighted(
            [weigh(words, index) for words in words_of(texts)], k
        )
