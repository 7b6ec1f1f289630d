"""Whether a service expands a query: the gate before generation that its run has fitted."""

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from expandr_jax.errors import UserError
from expandr_jax.ranking.gate import Gate, should_expand
from expandr_jax.ranking.gate_features import FIRST, PlainSearch, features_before
from expandr_jax.search import Bm25Index, words_of
from expandr_jax.serving.documents import Hit, View


class HasView(Protocol):
    """Documents that have a state at each moment, as `LiveDocuments`."""

    view: View


class QueryGate:
    """Decides by what a query finds, by its vector and by its words.

    Words are counted in the documents of the last merge, or of the start before the first one:
    writes since then change what a rare word is worth too little to count anew for each of them.

    Args:
        gate: The run's.
        index: Makes BM25's index of texts; UserError where they have no word.

    Raises:
        UserError: The gate reads what no plain search tells.
    """

    def __init__(self, gate: Gate, index: Callable[[Sequence[str]], Bm25Index]):
        # Now, and not at the first question.
        gate.probability(features_before(PlainSearch({}, {}, [], 0)))
        self._gate, self._index, self._indexing = gate, index, threading.Lock()
        self._words: tuple[Sequence[str], Bm25Index | None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the words of the documents have been counted."""
        return self._words is not None

    def count_words(self, documents: HasView) -> None:
        """Counts the words of all documents up to the last merge."""
        with self._indexing:
            base = documents.view.base
            try:
                self._words = base.ids, self._index(base.texts)
            except UserError:  # No document is left, or none with a word.
                self._words = base.ids, None

    def expands(self, queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> list[bool]:
        """Whether to expand each query, by the first `FIRST` documents that it finds, or more."""
        ids, index = self._words
        decided = []
        for number, words in enumerate(words_of(queries)):
            first, frequencies = {}, [0] * len(words)
            if index is not None:
                scores, rows = (part[0] for part in index.search([queries[number]], FIRST))
                first = {ids[row]: float(s) for row, s in zip(rows, scores, strict=True) if s > 0}
                frequencies = [index.frequency(word) for word in words]
            dense = {hit.id: hit.score for hit in found[number]}
            search = PlainSearch(dense, first, frequencies, len(ids))
            decided.append(should_expand(self._gate, search))
        return decided
