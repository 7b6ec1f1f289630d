"""BM25 over texts, by bm25s."""

import logging
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from expandr_jax.errors import UserError

_WORDS = {"stopwords": "english", "stemmer": None, "show_progress": False}


class Bm25Index:
    """Lucene's BM25 with the settings usual on BEIR (Anserini): k1 0.9, b 0.4.

    Text is lower-cased and split into words of two or more word characters; Lucene's 33 English
    stop words are dropped; nothing is stemmed (Anserini stems, so its figures differ a little).
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 0.9, b: float = 0.4):
        """Indexes `texts`, one a document, in order.

        Raises:
            UserError: there is no text, or no word in any of them.
        """
        bm25s = _bm25s()
        # Numbers of words, not the words: bm25s would number them in a second list as long.
        tokens = bm25s.tokenize(list(texts), return_ids=True, **_WORDS)
        if not any(tokens.ids):
            raise UserError(f"BM25: no word to index in {len(texts)} texts")
        self.size = len(texts)
        self._bm25 = bm25s.BM25(method="lucene", k1=k1, b=b)
        self._bm25.index(tokens, show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the documents for each query.

        Args:
            queries: texts; a word that stands twice counts twice.
            k: results a query.

        Returns:
            Scores [Q, min(k, N)] float32 and indices int32, best first, equal scores in the order
            of their indices. Documents that share no word with the query score 0 and come last.
        """
        if k < 1:
            raise UserError(f"k is {k}; a search returns at least 1 result a query")
        k = min(k, self.size)
        scores = np.empty((len(queries), k), np.float32)
        indices = np.empty((len(queries), k), np.int32)
        for row, words in enumerate(_tokenize(queries)):
            known = self._bm25.get_tokens_ids(words)
            scored = self._bm25.get_scores_from_ids(known)
            # bm25s's own top-k leaves the order of ties open.
            cut = np.partition(scored, self.size - k)[self.size - k]
            candidates = np.flatnonzero(scored >= cut)
            order = np.argsort(-scored[candidates], kind="stable")[:k]
            indices[row] = candidates[order]
            scores[row] = scored[indices[row]]
        return scores, indices


def _bm25s() -> ModuleType:
    """The library, imported late: it uses jax at import, whose devices can then not be chosen."""
    import bm25s

    # It sets itself to report every index that it builds.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


def _tokenize(texts: Sequence[str]) -> list[list[str]]:
    return _bm25s().tokenize(list(texts), return_ids=False, **_WORDS) if texts else []
