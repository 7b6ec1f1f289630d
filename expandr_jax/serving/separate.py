"""A query and its texts, each searched for itself among documents that come and go."""

from typing import Any

import numpy as np

from expandr_jax.expansion.combine import Found, combined, ranks_of, text_weights
from expandr_jax.serving.documents import Hit


def search_separately(
    documents: Any,
    vectors: np.ndarray,
    query_weight: float,
    how: str,
    *,
    depth: int,
    k: int,
    among: Any = None,
) -> list[Hit]:
    """The k best documents of one query, as of one moment.

    Args:
        documents: A `View` or `LiveDocuments`.
        vectors: [1 + texts, dim], the query's own first.
        query_weight: What its own search weighs.
        how: A key of `COMBINES`.
        depth: Documents that each search finds.
        k: Most documents.
        among: What results are limited to, as `documents.search` has it; None: to none.
    """
    view, rows = documents.at(among)
    found = [rows for _, rows in view.find(vectors, depth, [rows] * len(vectors))]
    union, ranks = ranks_of(found)
    scores = np.zeros(ranks.shape)  # Each is exact, whichever search has found the document.
    for of_query, vector in zip(scores, vectors, strict=True):
        values, places = view.best_of(union, vector, len(union))
        of_query[np.searchsorted(union, places)] = values
    weights = text_weights(query_weight, len(vectors) - 1)
    (best,), (places,) = combined([Found(union, scores, ranks)], [weights], how, k)
    return view.hits((best, places))
