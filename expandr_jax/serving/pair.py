"""A trained pair at work: queries are encoded and expanded, and documents are found for them."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from expandr_jax.expansion.combine import MEAN
from expandr_jax.ranking.gate_features import FIRST
from expandr_jax.serving.cache import Expansion
from expandr_jax.serving.documents import Hit
from expandr_jax.serving.gate import QueryGate
from expandr_jax.serving.queries import QueryEncoder
from expandr_jax.serving.separate import search_separately
from expandr_jax.vectors.encoder import Kind
from expandr_jax.vectors.query import Normalize, fuse, separate


class Searchable(Protocol):
    """Documents, as `View` or `LiveDocuments` has them."""

    def search(self, queries: np.ndarray, k: int, among: Sequence[Any] = ()) -> list[list[Hit]]:
        """The k best documents of each query [Q, D], of those that `among` names, if any."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One query to search for.

    Attributes:
        query: Its text.
        k: Documents.
        expansion: What was written for it; None: the query is alone.
        among: Ids to which the results are limited; None: to none.
        distilled: Whether it is encoded by the encoder that has learned what expansions say.
        gated: Whether the gate is asked if it should be expanded.
    """

    query: str
    k: int
    expansion: Expansion | None = None
    among: tuple[str, ...] | None = None
    distilled: bool = False
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class Answered:
    """What was found, and how long each step took, with all of the same batch.

    Attributes:
        hits: The documents, the best first.
        encode_seconds, search_seconds, gate_seconds: The last is 0 where no gate was asked.
        expands: Whether the gate, where it was asked, would have the query expanded.
    """

    hits: list[Hit]
    encode_seconds: float
    search_seconds: float
    gate_seconds: float = 0.0
    expands: bool = False


@dataclasses.dataclass(frozen=True)
class Pair:
    """How a run's chosen system searches.

    Attributes:
        encoder: Queries and passages to vectors.
        documents: What is searched.
        query_weight: The query's part in the vector of an expanded one, or in what is found.
        normalize: Where vectors are brought to unit length; see `expanded_query`.
        distilled: The encoder of queries that `train.distill` made, if it has.
        combine: How a query and its texts count together, one of `expansion.combine.WAYS`.
        depth: Documents that each of their searches finds, where these are several.
        gate: Says whether a query should be expanded, if there is one.
        kind: How passages that were written for queries are encoded.
    """

    encoder: QueryEncoder
    documents: Searchable
    query_weight: float
    normalize: Normalize
    distilled: QueryEncoder | None = None
    combine: str = MEAN
    depth: int = 100
    gate: QueryGate | None = None
    kind: Kind = "document"

    def search(self, asked: Sequence[Asked]) -> list[Answered]:
        """Finds documents for several queries at once."""
        start = time.perf_counter()
        vectors = self._vectors(asked)
        encoded = time.perf_counter()
        most = max(max(one.k, FIRST if one.gated else 0) for one in asked)
        found = self.documents.search(vectors, most, [one.among for one in asked])
        for i, one in enumerate(asked):
            if self._is_separate(one):
                found[i] = self._search_separately(one, vectors[i])
        searched = time.perf_counter()
        expands = self._expands(asked, vectors, found)
        gated = time.perf_counter() - searched if expands else 0.0
        times = encoded - start, searched - encoded, gated
        return [
            Answered(hits[: one.k], *times, expands.get(i, False))
            for i, (one, hits) in enumerate(zip(asked, found, strict=True))
        ]

    def compile(self, longest: int | None = None) -> None:
        """Compiles the programs of texts of up to `longest` tokens, so that no request waits."""
        for encoder in filter(None, (self.encoder, self.distilled)):
            encoder.compile(longest)

    def compile_expanded(self, samples: int) -> None:
        """As `compile`, of queries with so many passages."""
        vectors = self.passages(["passage"] * samples)
        self.search([Asked("query", 1, Expansion(("passage",) * samples, vectors))])

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages that were written for queries."""
        return self.encoder.encode(texts, [self.kind] * len(texts))

    def fused(self, query: np.ndarray, expansion: Expansion) -> np.ndarray:
        """The vector [D] of an expanded query, of that of the query alone."""
        present = np.array([[bool(text) for text in expansion.texts]])
        options = {"query_weight": self.query_weight, "normalize": self.normalize}
        return np.asarray(fuse(query[None], expansion.vectors[None], present, **options))[0]

    def _expands(
        self, asked: Sequence[Asked], vectors: np.ndarray, found: Sequence[list[Hit]]
    ) -> dict[int, bool]:
        """What the gate says of those queries for which it is asked, by their places."""
        places = [i for i, one in enumerate(asked) if one.gated]
        if not places:
            return {}
        first = {i: found[i] for i in places if asked[i].among is None}
        if limited := [i for i in places if i not in first]:  # It reads what all documents give.
            first |= zip(limited, self.documents.search(vectors[limited], FIRST), strict=True)
        said = self.gate.expands([asked[i].query for i in places], [first[i] for i in places])
        return dict(zip(places, said, strict=True))

    def _is_separate(self, one: Asked) -> bool:
        return one.expansion is not None and self.combine != MEAN

    def _search_separately(self, one: Asked, query: np.ndarray) -> list[Hit]:
        present = np.array([bool(text) for text in one.expansion.texts])
        vectors = separate(query, one.expansion.vectors[present], self.normalize)
        options = {"depth": max(self.depth, one.k), "k": one.k, "among": one.among}
        how = self.query_weight, self.combine
        return search_separately(self.documents, vectors, *how, **options)

    def _vectors(self, asked: Sequence[Asked]) -> np.ndarray:
        rows: list[np.ndarray] = [np.empty(0)] * len(asked)
        for distilled, encoder in ((False, self.encoder), (True, self.distilled)):
            places = [i for i, one in enumerate(asked) if one.distilled == distilled]
            texts = [asked[i].query for i in places]
            vectors = encoder.encode(texts, ["query"] * len(texts)) if texts else ()
            for place, vector in zip(places, vectors, strict=True):
                own = asked[place].expansion
                plain = own is None or self._is_separate(asked[place])
                rows[place] = vector if plain else self.fused(vector, own)
        return np.stack(rows)
