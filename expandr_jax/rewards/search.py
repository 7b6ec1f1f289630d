"""Rewards of a candidate as its query's expansion in a search of the corpus, or of a sample."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.rewards import ranks
from expandr_jax.rewards.answers import Answers
from expandr_jax.search import Index

BLOCK_ROWS = 8192  # Expanded queries whose results are in memory at once.
BLOCKS = 2  # So many times that are rewarded together: what is searched for then is as of all.


@dataclasses.dataclass(frozen=True)
class Judged:
    """The relevant documents of some queries.

    Attributes:
        queries: Ids of the queries.
        documents: [queries, count] rows of the index, the first one's grade the highest; -1 fills.
        grades: [queries, count] relevance; 0 fills.
        left_out: [queries, count] rows of the index that leave the query's rankings before these
            are cut, as in evaluation; -1 fills.
    """

    queries: Sequence[str]
    documents: np.ndarray
    grades: np.ndarray
    left_out: np.ndarray


def judged_documents(
    data: TrainingData,
    queries: Sequence[str],
    rows: Mapping[str, int],
    *,
    split: str = "train",
    width: int = 0,
    drop_identical_ids: bool = False,
) -> Judged:
    """The relevant documents of some of a split's queries.

    `rows` is document id -> its row; there are `width` columns, or as many as it takes. With
    `drop_identical_ids`, a document with a query's id is left out for it.
    """
    positives = [data.positives(query, split) for query in queries]
    shape = len(queries), width or max(map(len, positives), default=1)
    documents, grades = np.full(shape, -1), np.zeros(shape)
    for row, (query, ids) in enumerate(zip(queries, positives, strict=True)):
        judged = data.collection.qrels[split][query]
        documents[row, : len(ids)] = [rows[document] for document in ids]
        grades[row, : len(ids)] = [judged[document] for document in ids]
    without = [
        [rows[document] for document in data.left_out(query, drop_identical_ids)]
        for query in queries
    ]
    left_out = np.full((len(queries), max(map(len, without), default=0)), -1)
    for row, own in enumerate(without):
        left_out[row, : len(own)] = own
    return Judged(queries, documents, grades, left_out)


def queries_at_once(candidates: int) -> int:
    """How many queries with so many candidates each are rewarded together."""
    return BLOCKS * max(1, BLOCK_ROWS // max(1, candidates))


@dataclasses.dataclass(frozen=True)
class Searched:
    """The results of some searches.

    Attributes:
        scores, found: [searches, depth] of the documents found, and their rows; -1 fills.
        documents, grades: As of `Judged`, a row for each search.
        temperature: Divides the scores.
        held: Says which of the found documents hold an answer, [searches, depth] bool.
    """

    scores: np.ndarray
    found: np.ndarray
    documents: np.ndarray
    grades: np.ndarray
    temperature: float
    held: Callable[[], np.ndarray]

    @property
    def ranks(self) -> np.ndarray:
        """[searches, count] those of the relevant documents; 0 for one that was not found."""
        return ranks.ranks_in_results(self.found, self.documents)


@dataclasses.dataclass(frozen=True)
class SearchMeasure:
    """What searches are worth.

    Attributes:
        of: Searches to [searches].
        scores: It looks at their scores, which vectors of any length would make sharper.
        answers: It looks for documents that hold an answer.
    """

    of: Callable[[Searched], np.ndarray]
    scores: bool = False
    answers: bool = False


SEARCH_MEASURES = {
    "reciprocal_rank": SearchMeasure(
        lambda searched: ranks.reciprocal_rank(
            ranks.ranks_in_results(searched.found, searched.documents[:, :1])[:, 0]
        )
    ),
    "ndcg": SearchMeasure(lambda searched: ranks.ndcg(searched.ranks, searched.grades)),
    "average_precision": SearchMeasure(
        lambda searched: ranks.average_precision(searched.ranks, searched.grades > 0)
    ),
    "softmax_share": SearchMeasure(
        lambda searched: ranks.softmax_share(
            searched.scores, searched.found, searched.documents, searched.temperature
        ),
        scores=True,
    ),
    "piecewise_rank": SearchMeasure(
        lambda searched: ranks.piecewise_rank(ranks.best_rank(searched.ranks))
    ),
    "hit": SearchMeasure(
        lambda searched: searched.held().any(axis=-1).astype(np.float64), answers=True
    ),
}

# Some of the queries -> scores and rows of the documents found, [searches, depth] each, -1 filling
# rows; the searches of a query follow one another.
BlockSearch = Callable[[slice], tuple[np.ndarray, np.ndarray]]


def measure_searches(
    search: BlockSearch,
    judged: Judged,
    each: int,
    measure: str,
    temperature: float,
    answers: Answers,
    depth: int,
) -> np.ndarray:
    """What each of several searches for each query is worth: [queries, each] float64.

    Args:
        search: Searches for all of some queries at once, for `depth` documents and as many more
            as `judged.left_out` has columns.
        judged: The queries' relevant documents.
        each: Searches of a query.
        measure: One of `SEARCH_MEASURES`.
        temperature: Divides the scores, for a measure that looks at them.
        answers: The collection's, for a measure that looks for them.
        depth: Documents of a search that count.
    """
    result = np.zeros((len(judged.queries), each))
    rows = max(1, BLOCK_ROWS // max(1, each))
    for start in range(0, len(result), rows):
        part = slice(start, start + rows)
        relevant = (np.repeat(x[part], each, axis=0) for x in (judged.documents, judged.grades))
        left_out = np.repeat(judged.left_out[part], each, axis=0)
        scores, found = _ranked(*search(part), left_out, depth)
        queries = [query for query in judged.queries[part] for _ in range(each)]
        held = functools.partial(answers.held, queries, found)
        worth = SEARCH_MEASURES[measure].of(Searched(scores, found, *relevant, temperature, held))
        result[part] = worth.reshape(-1, each)
    return result


def _ranked(
    scores: np.ndarray, found: np.ndarray, left_out: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `depth` results of those that are not left out."""
    if not left_out.shape[1]:
        return scores, found
    gone = (found[:, :, None] == left_out[:, None]).any(axis=-1) & (found >= 0)
    kept = np.argsort(gone, axis=1, kind="stable")[:, :depth]
    found = np.where(gone, -1, found)
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(found, kept, axis=1)


def vector_search(index: Index, vectors: np.ndarray, depth: int) -> BlockSearch:
    """Searches an index for some vectors of each query, [queries, searches of a query, dim]."""

    def search(part: slice) -> tuple[np.ndarray, np.ndarray]:
        return index.search(vectors[part].reshape(-1, vectors.shape[-1]), depth)

    return search


def group_reward(
    vectors: np.ndarray, fused: np.ndarray, judged: Judged, *, sets: int, size: int, seed: int
) -> np.ndarray:
    """`ranks.group_ndcg` over sets drawn by (seed, query id): [queries, candidates].

    Args:
        vectors: [documents, dim] of the corpus.
        fused: [queries, candidates, dim] a query's vector with each of its candidates.
        judged: The same queries' relevant documents.
        sets: How many are drawn for a query.
        size: Documents of a set beside the relevant ones, or all others where there are fewer.
        seed: What they are drawn by.
    """
    result = np.zeros(fused.shape[:2])
    for row, query in enumerate(judged.queries):
        relevant = judged.documents[row][judged.documents[row] >= 0]
        left_out = judged.left_out[row][judged.left_out[row] >= 0]
        drawn = _draw_sets(query, relevant, left_out, len(vectors), sets, size, seed)
        grades = np.zeros(drawn.shape)
        # The relevant documents stand last, so that a tie counts against them.
        grades[:, drawn.shape[1] - len(relevant) :] = judged.grades[row, : len(relevant)]
        documents = np.asarray(vectors[drawn.ravel()], np.float32).reshape(*drawn.shape, -1)
        result[row] = ranks.group_ndcg(fused[row], documents, grades)
    return result


def _draw_sets(
    query: str,
    relevant: np.ndarray,
    left_out: np.ndarray,
    total: int,
    count: int,
    size: int,
    seed: int,
) -> np.ndarray:
    """[sets, documents] rows of the corpus: other documents than the relevant ones, then these."""
    others_than = np.union1d(relevant, left_out)
    digest = hashlib.sha256(query.encode()).digest()
    generator = np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])
    size = min(size, total - len(others_than))
    sets = []
    for _ in range(count):
        drawn = generator.choice(total, size + len(others_than), replace=False)
        others = drawn[~np.isin(drawn, others_than)][:size]
        sets.append(np.concatenate([others, relevant]))
    return np.stack(sets)
