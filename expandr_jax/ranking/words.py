"""Queries of BM25 as weights of words: weighed as documents are, or fed back from what they found.

A query is a mapping of its words, as BM25's index splits texts, to their weights.
"""

import collections
import math
from collections.abc import Mapping, Sequence

from expandr_jax.search import Bm25Index

Weights = Mapping[str, float]

RM3_DOCUMENTS = 10  # Documents found first, which RM3 takes to be relevant.
RM3_TERMS = 10  # Words that it takes of each, and of all of them.
RM3_QUERY = 0.5  # Share of the query as it was.
RM3_SHARE = 0.1  # A word that more of the documents have says nothing.
RM3_LETTERS = range(2, 21)  # How many a word has that is taken.


def counted(words: Sequence[str], index: Bm25Index) -> dict[str, float]:
    """How often each word stands in a query: BM25 as it searches for texts."""
    return dict(collections.Counter(words))


def saturated(words: Sequence[str], index: Bm25Index) -> dict[str, float]:
    """Each word's weight by BM25, as if the query were one of the documents.

    idf(w) n / (n + k1 (1 - b + b |q| / mean length)), where w stands n times among the |q| words.
    Long queries, as BRIGHT's, repeat what matters little. BRIGHT's authors have gensim's BM25 model
    weigh queries as it does documents; the query-side BM25 of Anserini and Pyserini (arXiv
    2509.02558) does the same by Lucene's formula, which this is. The mean is over all documents
    here, over those with a word in Lucene.
    """
    options = index.options
    norm = options.k1 * (1 - options.b + options.b * len(words) / index.mean_length)
    return {
        word: _idf(index, word) * count / (count + norm)
        for word, count in collections.Counter(words).items()
    }


def rm3(
    query: Weights, found: Sequence[tuple[float, Sequence[str]]], index: Bm25Index
) -> dict[str, float]:
    """RM3: the query mixed half and half with a model of the documents that it found.

    Each document is its `RM3_TERMS` most frequent words, with their shares of those; the model is
    the sum over documents of shares times the document's score, cut to as many words. Query and
    model each sum to 1 before they are mixed. Words that more than a tenth of the documents have
    are not taken, nor are those of one letter or more than 20, nor those with signs in them.

    Abdul-Jaleel et al., TREC 2004, as Anserini and Pyserini have it, where a tie is broken by
    chance; here the first word in the alphabet is taken, and words may be of any script.

    Args:
        query: Weights of its words.
        found: Score and words of each document that it found, best first.
        index: The documents.
    """
    model: dict[str, float] = collections.defaultdict(float)
    for score, words in found:
        taken = _most(collections.Counter(w for w in words if _tells(w, index)))
        total = sum(taken.values())
        for word, count in taken.items():
            model[word] += score * count / total
    mixed = {word: RM3_QUERY * share for word, share in _shares(query).items()}
    for word, share in _shares(_most(model)).items():
        mixed[word] = mixed.get(word, 0.0) + (1 - RM3_QUERY) * share
    return mixed


def _idf(index: Bm25Index, word: str) -> float:
    """Lucene's inverse document frequency, as BM25 has it; 0 for a word of no document."""
    frequency = index.frequency(word)
    return math.log(1 + (index.size - frequency + 0.5) / (frequency + 0.5)) if frequency else 0.0


def _tells(word: str, index: Bm25Index) -> bool:
    """Whether RM3 may take a word into the query."""
    rare = index.frequency(word) <= RM3_SHARE * index.size
    return len(word) in RM3_LETTERS and word.isalnum() and rare


def _most(weights: Weights) -> Weights:
    """The words with the highest weights."""
    ranked = sorted(weights.items(), key=lambda pair: (-pair[1], pair[0]))
    return dict(ranked[:RM3_TERMS])


def _shares(weights: Weights) -> Weights:
    """Weights that sum to 1; none where there are no words, or all weigh nothing."""
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()} if total else {}
