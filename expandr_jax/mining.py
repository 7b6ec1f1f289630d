"""Hard negatives from the results of a search, written as triples that others can train on."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np

QUERIES_AT_ONCE = 1 << 16  # Searched for in one pass over the corpus, and in memory.


def mine_negatives(
    scores: np.ndarray,
    indices: np.ndarray,
    positive_scores: np.ndarray,
    positives: Sequence[Collection[int]],
    documents: Sequence[str],
    *,
    count: int,
    first: int = 0,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
) -> list[list[int]]:
    """Takes the best results of each query that are not relevant, and do not look as if they were.

    At most one document of each text is taken, and none with the text of a relevant document.

    Args:
        scores: [queries, found], as `Index.search` returns them.
        indices: [queries, found] documents, best first.
        positive_scores: [queries] scores of the relevant documents: of the one to be found, or the
            least of them where no known one may be outscored.
        positives: All documents of each query that are known to be relevant.
        documents: Texts of the corpus, in the order of the index.
        count: Negatives a query at most.
        first: Results left out at the top, where relevant documents that nobody judged are likely.
        absolute_margin: A negative scores at most the positive's score minus this.
        relative_margin: A negative scores at most the positive's score minus this share of its
            absolute value (0.05: 95 % of a positive score).

    Returns:
        Documents of each query, hardest first.

    Raises:
        ValueError: If the shapes do not fit or a number is out of range.

    References:
        Margins: Moreira et al., NV-Retriever, arXiv 2407.15831, section 4.
    """
    scores, indices = np.asarray(scores), np.asarray(indices)
    positive_scores = np.asarray(positive_scores, np.float64)
    queries = len(positives)
    if scores.shape != indices.shape or scores.shape[:1] != (queries,):
        raise ValueError(f"scores {scores.shape}, indices {indices.shape}, {queries} queries")
    if positive_scores.shape != (queries,):
        raise ValueError(f"positive_scores {positive_scores.shape} of {queries} queries")
    if count < 1 or first < 0:
        raise ValueError(f"count {count}, first {first}; expected 1 and 0 or more")
    highest = np.full(queries, np.inf)
    if absolute_margin is not None:
        highest = np.minimum(highest, positive_scores - absolute_margin)
    if relative_margin is not None:
        highest = np.minimum(highest, positive_scores - relative_margin * np.abs(positive_scores))
    allowed = scores <= highest[:, None]
    allowed[:, :first] = False
    mined = []
    for query, relevant in enumerate(positives):
        seen = {documents[document].strip() for document in relevant}
        taken: list[int] = []
        for document in indices[query, allowed[query]].tolist():
            if len(taken) == count:
                break
            text = documents[document].strip()
            if text and text not in seen:
                seen.add(text)
                taken.append(document)
        mined.append(taken)
    return mined


def triple_rows(
    queries: Sequence[str],
    positives: Sequence[Sequence[int]],
    negatives: Sequence[Sequence[int]],
    documents: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """Rows as `data.triples.read_triples` reads them, which refuses a query without positives.

    The arguments are as for `mine_negatives` and from it; empty positives are left out.
    """
    for query, relevant, others in zip(queries, positives, negatives, strict=True):
        yield {
            "query": query,
            "pos": [documents[document] for document in relevant if documents[document].strip()],
            "neg": [documents[document] for document in others],
        }
