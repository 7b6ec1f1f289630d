"""What may follow a search, by the names that systems have: feedback and fusions.

BM25's feedback, and what else weighs the words of its queries, is in ranking/words.py.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from expandr_jax.metrics import rank_documents
from expandr_jax.ranking.words import RM3_DOCUMENTS, Weights, counted, rm3, saturated
from expandr_jax.search import Bm25Index


def average_feedback(query: jax.Array, documents: jax.Array) -> jax.Array:
    """The mean [batch, dim] of a query's vector and those of the k documents it found first.

    Takes [batch, dim] and [batch, k, dim], and returns float32. Average PRF of Li et al., arXiv
    2108.11044.
    """
    query, documents = query.astype(jnp.float32), documents.astype(jnp.float32)
    return jnp.mean(jnp.concatenate([query[:, None], documents], axis=1), axis=1)


def rocchio(query: jax.Array, relevant: jax.Array, *, alpha: float, beta: float) -> jax.Array:
    """alpha E(q) + beta mean(relevant): Rocchio's formula without irrelevant documents.

    Takes [batch, dim] and [batch, k, dim], the documents found first, and returns [batch, dim]
    float32. Rocchio (1971); on dense vectors Li et al., arXiv 2108.11044.
    """
    moved = alpha * query.astype(jnp.float32)
    return moved + beta * jnp.mean(relevant.astype(jnp.float32), axis=1)


def reciprocal_rank_fusion(rankings: Sequence[Sequence[str]], k: float = 60.0) -> dict[str, float]:
    """Fuses one query's rankings, best first: score(d) = sum over rankings of 1 / (k + rank of d).

    Ranks count from 1, a ranking that lacks a document adds nothing to it, and `k` evens out the
    first ranks. Documents come in the order in which they are met. Cormack et al., SIGIR 2009.
    """
    fused: dict[str, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            fused[document] = fused.get(document, 0.0) + 1 / (k + rank)
    return fused


def exp4fuse(rankings: Sequence[Sequence[str]], k: float = 60.0) -> dict[str, float]:
    """`reciprocal_rank_fusion`, times 1 + n / 10 for a document that n of the rankings hold.

    In the paper they are those of the query and of the query five times and a passage. Exp4Fuse,
    arXiv 2506.04760.
    """
    held = collections.Counter(document for ranking in rankings for document in ranking)
    fused = reciprocal_rank_fusion(rankings, k)
    return {document: (1 + held[document] / 10) * score for document, score in fused.items()}


def interpolate(runs: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """Fuses one query's scores: their weighted sum, each run's scaled from 0 to 1 (min-max).

    A run that lacks a document adds nothing to it, and where all scores of a run are equal each
    counts as 1. Documents come in the order in which they are met. Raises ValueError where there
    are more or fewer weights than runs.
    """
    fused: dict[str, float] = {}
    for scores, weight in zip(runs, weights, strict=True):
        low, high = min(scores.values(), default=0.0), max(scores.values(), default=0.0)
        for document, score in scores.items():
            scaled = (score - low) / (high - low) if high > low else 1.0
            fused[document] = fused.get(document, 0.0) + weight * scaled
    return fused


FEEDBACK_DEPTH = 3  # Documents that vector feedback takes to be relevant.
# (query vectors [queries, dim], vectors of the documents found first [queries, depth, dim]) to
# query vectors.
FEEDBACKS = {
    "prf-average": average_feedback,
    "prf-rocchio": lambda query, found: rocchio(query, found, alpha=0.9, beta=0.1),
}
# How BM25 weighs the words of a query, by the name of the searcher: (words, index) to weights.
WEIGHINGS: dict[str, Callable[[Sequence[str], Bm25Index], Weights]] = {
    "bm25": counted,
    "bm25q": saturated,
}
WORD_FEEDBACK_DEPTH = RM3_DOCUMENTS  # Documents that feedback on BM25 takes to be relevant.
# (weights of a query's words, score and words of each document found first, index) to weights.
WORD_FEEDBACKS: dict[str, Callable[[Weights, Sequence[Any], Bm25Index], Weights]] = {"rm3": rm3}


def _by_rank(fuse: Callable[[Sequence[Sequence[str]]], dict[str, float]]) -> Callable[..., Any]:
    """A fusion of rankings as one of scores."""
    return lambda runs: fuse([[d for d, _ in rank_documents(scores)] for scores in runs])


# One query's scores in each run, document id -> score, to those of the fused run.
FUSIONS: dict[str, Callable[[Sequence[Mapping[str, float]]], dict[str, float]]] = {
    "rrf": _by_rank(reciprocal_rank_fusion),
    "exp4fuse": _by_rank(exp4fuse),
    "interpolation": lambda runs: interpolate(runs, [1 / len(runs)] * len(runs)),
}
# The fusions whose parts may have other weights than equal ones.
WEIGHED_FUSIONS = {"interpolation": interpolate}
