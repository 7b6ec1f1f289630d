"""Which documents hold an answer to a query, for a measure of searches that asks for that."""

import functools
from collections.abc import Sequence

import numpy as np

from expandr_jax.data.answers import holds_answer, normalized_words
from expandr_jax.data.beir import Collection
from expandr_jax.data.documents import texts_of

CACHE_SIZE = 100_000  # Texts, and documents of a query, that are not looked at again.


class Answers:
    """The answers that a collection gives, and its documents that hold them."""

    def __init__(self, collection: Collection):
        texts, answers = texts_of(collection.corpus), collection.answers
        # Candidates of one query find the same documents, and queries often do.
        words = functools.lru_cache(CACHE_SIZE // 10)(lambda row: normalized_words(texts[row]))
        wanted = functools.lru_cache(CACHE_SIZE // 10)(
            lambda q: [*map(normalized_words, answers.get(q, ()))]
        )
        self._holds = functools.lru_cache(CACHE_SIZE)(
            lambda query, row: holds_answer(words(row), wanted(query))
        )

    def held(self, queries: Sequence[str], found: np.ndarray) -> np.ndarray:
        """Whether each document that a search found, [queries, depth] rows, holds an answer.

        -1 fills rows; no document holds one to a query without any.
        """
        return np.array(
            [
                [row >= 0 and self._holds(query, row) for row in rows]
                for query, rows in zip(queries, found.tolist(), strict=True)
            ],
            bool,
        ).reshape(found.shape)
