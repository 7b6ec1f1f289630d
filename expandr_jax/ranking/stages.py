"""What may follow a search, by the names that systems have: feedback and fusions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expandr_jax.metrics import rank_documents
from expandr_jax.ranking import fusion

FEEDBACK_DEPTH = 3  # Documents that vector feedback takes to be relevant.
# (query vectors [queries, dim], vectors of the documents found first [queries, depth, dim]) to
# query vectors.
FEEDBACKS = {
    "prf-average": fusion.average_feedback,
    "prf-rocchio": lambda query, found: fusion.rocchio(query, found, alpha=0.9, beta=0.1),
}


def _by_rank(fuse: Callable[[Sequence[Sequence[str]]], dict[str, float]]) -> Callable[..., Any]:
    """A fusion of rankings as one of scores."""
    return lambda runs: fuse([[d for d, _ in rank_documents(scores)] for scores in runs])


# One query's scores in each run, document id -> score, to those of the fused run.
FUSIONS: dict[str, Callable[[Sequence[Mapping[str, float]]], dict[str, float]]] = {
    "rrf": _by_rank(fusion.reciprocal_rank_fusion),
    "exp4fuse": _by_rank(fusion.exp4fuse),
    "interpolation": lambda runs: fusion.interpolate(runs, [1 / len(runs)] * len(runs)),
}
