"""What a gate reads of a query: how sure of itself the search was, and what was written for it.

Everything is of one query. Before generation there is its plain search alone, which a service has
made anyway; after it there are the passages and what the expanded query found, too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

FIRST = 10  # Documents of a ranking that are looked at; a search need not have found more.
BEFORE, AFTER = "expandr-gated", "expandr-gated-after"  # Gates, by the rows that they make.
GATES = (BEFORE, AFTER)

Ranking = Mapping[str, float]  # Document -> score, of one query.


@dataclasses.dataclass(frozen=True)
class PlainSearch:
    """What a query as it is has found.

    Attributes:
        dense: By its vector, the first `FIRST` documents or more.
        bm25: By its words; the same.
        frequencies: How many of the documents have each of its words, a word as often as it stands
            in the query, as `search.words_of` splits it.
        documents: How many there are.
    """

    dense: Ranking
    bm25: Ranking
    frequencies: Sequence[int]
    documents: int


@dataclasses.dataclass(frozen=True)
class Written:
    """What was written for a query, and found with it.

    Attributes:
        query: [dim] the query's vector.
        passages: [passages, dim] vectors of its passages that are not empty.
        words: How many words each of them has.
        expanded: What the expanded query found.
        log_probs: The mean log-probability of each passage's tokens as they were sampled; None
            where nobody kept them.
    """

    query: np.ndarray
    passages: np.ndarray
    words: Sequence[int]
    expanded: Ranking
    log_probs: Sequence[float] | None = None


def features_before(search: PlainSearch) -> dict[str, float]:
    """What the gate before generation reads, by name."""
    dense, bm25 = first_of(search.dense), first_of(search.bm25)
    return {
        **_of_scores("dense", dense),
        **_of_scores("bm25", bm25),
        "overlap": _overlap(dense, bm25),
        **_of_words(search),
    }


def features_after(search: PlainSearch, written: Written) -> dict[str, float]:
    """What the gate after generation reads, by name: the same, and what was written."""
    expanded = first_of(written.expanded)
    cosines = _cosines(np.concatenate([written.query[None], written.passages]))
    with_query, count = cosines[0, 1:], len(written.passages)
    pairs = cosines[1:, 1:][np.triu_indices(count, 1)]
    told = written.log_probs
    return {
        **features_before(search),
        "passages": float(count),
        "passage_words": _mean(written.words),
        "query_cosine": _mean(with_query),
        "query_cosine_least": float(with_query.min()) if count else 0.0,
        # A passage agrees with itself.
        "agreement": _mean(pairs) if count > 1 else float(count),
        "expanded_overlap": _overlap(first_of(search.dense), expanded),
        "expanded_overlap_bm25": _overlap(first_of(search.bm25), expanded),
        "first_kept": float([*first_of(search.dense)][:1] == [*expanded][:1]),
        "expanded_first": max(expanded.values(), default=0.0),
        **({} if told is None else {"log_probability": _mean(told)}),
    }


def first_of(ranking: Ranking) -> dict[str, float]:
    """The first documents of a ranking; of equal scores the greater id is first, as in runs/."""
    ranked = sorted(ranking.items(), key=lambda pair: (pair[1], pair[0]), reverse=True)
    return dict(ranked[:FIRST])


def _of_scores(name: str, first: Ranking) -> dict[str, float]:
    """How the scores of the first documents stand out from each other; 0 without any."""
    scores = np.array([*first.values()], np.float64)
    if not len(scores):
        scores = np.zeros(1)
    deviation = float(scores.std())
    return {
        f"{name}_first": float(scores[0]),
        f"{name}_margin": float(scores[0] - scores[min(1, len(scores) - 1)]),
        f"{name}_margin_last": float(scores[0] - scores[-1]),
        f"{name}_mean": float(scores.mean()),
        f"{name}_deviation": deviation,
        f"{name}_entropy": _entropy((scores - scores[0]) / deviation if deviation else scores),
    }


def _entropy(scores: np.ndarray) -> float:
    """The entropy of the softmax of scores, in nats.

    They are in deviations: cosines lie so near each other, and BM25's scores so far apart, that
    their own softmax would be even in the one case and one document's in the other.
    """
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    return float(-(shares * np.log(shares)).sum())


def _overlap(one: Ranking, other: Ranking) -> float:
    """Share of the first documents that both rankings have."""
    return len(one.keys() & other.keys()) / FIRST


def _of_words(search: PlainSearch) -> dict[str, float]:
    """How many words the query has, and how rare they are: ln((N + 1) / (documents + 1)) each."""
    rarity = [math.log((search.documents + 1) / (n + 1)) for n in search.frequencies]
    return {
        "words": float(len(rarity)),
        "rarity_mean": _mean(rarity),
        "rarity_most": max(rarity, default=0.0),
        "words_unknown": float(sum(n == 0 for n in search.frequencies)),
    }


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """[n, n] cosines of vectors [n, dim]; 0 with a vector of zeros."""
    vectors = vectors.astype(np.float64)
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return units @ units.T


def _mean(values: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0
