"""Queries as vectors, searched in a corpus's index, with their expansions averaged as is chosen."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from expandr_jax import metrics
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.ranking.fusion import Normalize, expanded_query
from expandr_jax.search import Index

# One program for each shape: uncompiled, each of its dozen operations would be a program.
fuse = jax.jit(expanded_query, static_argnames="normalize")


@dataclasses.dataclass(frozen=True)
class EncodedQueries:
    """Vectors of the queries of one split, under one retriever.

    Attributes:
        ids: Query ids.
        queries: [queries, dim].
        expansions: [queries, samples, dim], or None.
        present: [queries, samples] bool, False for an empty generation, or None.
    """

    ids: Sequence[str]
    queries: np.ndarray
    expansions: np.ndarray | None = None
    present: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a system uses its expansions.

    Attributes:
        query_weight: Weight of the query's own vector.
        samples: How many sampled expansions are averaged.
    """

    query_weight: float
    samples: int


def dense_run(
    index: Index,
    document_ids: Sequence[str],
    encoded: EncodedQueries,
    choice: Choice | None,
    *,
    normalize: Normalize,
    depth: int,
    drop_identical_ids: bool,
) -> dict[str, dict[str, float]]:
    """Searches the index for each query, expanded where there is a choice.

    Args:
        index: Over the corpus, under the retriever that encoded the queries.
        document_ids: In the order of the index.
        encoded: The queries.
        choice: How expansions are used; None searches plain queries.
        normalize: Where expanded vectors are brought to unit length.
        depth: Documents a query.
        drop_identical_ids: Leave out a document whose id is the query's (ArguAna).

    Returns:
        Query id -> document id -> score.
    """
    vectors = encoded.queries
    if choice is not None:
        vectors = np.asarray(
            fuse(
                encoded.queries,
                encoded.expansions[:, : choice.samples],
                encoded.present[:, : choice.samples],
                query_weight=choice.query_weight,
                normalize=normalize,
            )
        )
    scores, indices = index.search(vectors, depth + drop_identical_ids)
    run = metrics.make_run(encoded.ids, document_ids, scores, indices)
    return finish_run(run, depth, drop_identical_ids)


def finish_run(
    run: Mapping[str, Mapping[str, float]], depth: int, drop_identical_ids: bool
) -> dict[str, dict[str, float]]:
    """Cuts each query's documents to `depth`, after its own id is left out if so asked."""
    result = {}
    for query, scores in run.items():
        kept = [pair for pair in scores.items() if not (drop_identical_ids and pair[0] == query)]
        result[query] = dict(kept[:depth])
    return result


def choose(
    index: Index,
    document_ids: Sequence[str],
    encoded: EncodedQueries,
    qrels: Mapping[str, Mapping[str, int]],
    choices: Sequence[Choice],
    **settings,
) -> tuple[Choice, list[tuple[Choice, float]]]:
    """Tries every choice on dev queries; the first of the best is taken.

    Args:
        index: As for `dense_run`, as are `document_ids` and `settings`.
        document_ids: Likewise.
        encoded: The dev queries with their expansions.
        qrels: Their judgements.
        choices: What to try.
        **settings: Passed to `dense_run`.

    Returns:
        The choice, and the mean nDCG@10 of each one tried.
    """
    tried = []
    for choice in choices:
        run = dense_run(index, document_ids, encoded, choice, **settings)
        values = metrics.evaluate(run, qrels, (CHOSEN_BY,))[CHOSEN_BY]
        tried.append((choice, metrics.mean(values)))
    best = max(value for _, value in tried)
    return next(choice for choice, value in tried if value == best), tried
