"""Re-rankers: they read a query and each of the first documents of its ranking together."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.metrics import RunScores, rank_documents
from expandr_jax.models.cross_encoder import CrossEncoder, Cut
from expandr_jax.settings import count, several
from expandr_jax.weights.cross_encoder import load_cross_encoder
from expandr_jax.weights.trees import hash_tree

Scorer = Callable[[str, Sequence[str]], np.ndarray]  # (query, documents) to scores [documents].


@dataclasses.dataclass(frozen=True)
class RerankSettings:
    """The section `evaluation.rerank`; configs/base.py says what each setting means."""

    source: str
    depth: Annotated[int, count(1)]
    max_length: Annotated[int, count(1)]
    rows: Annotated[int, count(1)]
    depths: Annotated[tuple[int, ...], several(count(1), least=0)] = ()


@dataclasses.dataclass(frozen=True)
class Reranker:
    """How a re-ranker is made of the config's section `evaluation.rerank`.

    `check` refuses, by a UserError, settings that cannot work, before anything is ranked. `hashes`
    are of what scores depend on, by what a message calls it. `load` is given what is called with
    whether each pair is longer than is read.
    """

    check: Callable[[RerankSettings], None]
    load: Callable[[RerankSettings, Cut], Scorer]
    hashes: Callable[[RerankSettings], dict[str, str]] = lambda _: {}


def check_cross_encoder(settings: RerankSettings) -> None:
    """Refuses a source that is none, or no cross-encoder."""
    if not settings.source:
        raise UserError(
            "evaluation.rerank.source is ''; expected a cross-encoder, as a system has rerank:"
        )
    load_cross_encoder(settings.source, max_length=settings.max_length)


def cross_encoder_hashes(settings: RerankSettings) -> dict[str, str]:
    """Hashes of its weights, and of all else that its scores depend on."""
    return named_hashes("evaluation.rerank.source", *_loaded(settings.source, settings.max_length))


def named_hashes(name: str, model: Any, params: Any) -> dict[str, str]:
    """Hashes of a model's weights and of its `identity`, by what a message calls them."""
    return {
        f"{name}, its weights": hash_tree(params),
        f"{name}, what its files say": model.identity,
    }


def load_scorer(settings: RerankSettings, cut: Cut | None = None) -> Scorer:
    """A BERT that was trained to say how well a query and a document match (arXiv 1901.04085)."""
    model, params = _loaded(settings.source, settings.max_length)
    return functools.partial(model.scores, params, rows=settings.rows, cut=cut)


@functools.lru_cache(maxsize=1)  # However many systems are ranked again, one is in memory.
def _loaded(source: str, max_length: int) -> tuple[CrossEncoder, Any]:
    return load_cross_encoder(source, max_length=max_length)


RERANKERS = {"rerank": Reranker(check_cross_encoder, load_scorer, cross_encoder_hashes)}


def rank_again(
    run: RunScores,
    queries: Mapping[str, str],
    corpus: Mapping[str, str],
    score: Scorer,
    depth: int,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, dict[str, float]]:
    """Orders the first `depth` documents of each query by a re-ranker; the others follow as before.

    Scores are the re-ranker's, and below its lowest for documents that it did not read, each 1 less
    than the one before. Queries and the corpus are texts by their ids; `progress` is called with 1
    after each query.
    """
    again = {}
    for query, found in run.items():
        documents = [document for document, _ in rank_documents(found)]
        first, rest = documents[:depth], documents[depth:]
        scores = score(queries[query], [corpus[document] for document in first]).tolist()
        low = min(scores, default=0.0)
        again[query] = dict(zip(first, scores, strict=True)) | {
            document: low - n for n, document in enumerate(rest, start=1)
        }
        progress(1)
    return again
