"""How well a model that is trained ranks the dev queries of a collection: mean nDCG@10."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from expandr_jax import metrics
from expandr_jax.data.beir import Collection
from expandr_jax.data.documents import ids_of, texts_of
from expandr_jax.files.scratch import scratch_array
from expandr_jax.metrics import CHOSEN_BY, RunScores
from expandr_jax.models.cross_encoder import CrossEncoder, say_cut
from expandr_jax.ranking.rerank import rank_again
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.search import Index, build_index, search_named
from expandr_jax.sharding import whole
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.encoder import TEXTS_AT_ONCE
from expandr_jax.vectors.sparse import build_sparse, sparse_vectors
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING


def kept_vectors(
    retriever: CorpusRetriever, texts: Sequence[str], progress: Callable[[int], None]
) -> np.ndarray:
    """Vectors of documents, [texts, dim] float32, for process 0 in a file without a name.

    All processes call it together. None holds more than a block of texts and of vectors.
    """
    kept = np.zeros((0, 0), np.float32)
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        some = texts[first : first + TEXTS_AT_ONCE]
        block = retriever.encode(some, "document", progress=progress, main_alone=True)
        if retriever.processes.is_main:
            if not first:
                shape = len(texts), block.shape[1]
                kept = scratch_array(math.prod(shape), np.float32, "vectors").reshape(shape)
            kept[first : first + len(block)] = block
    return kept


def retriever_on_dev(
    retriever: CorpusRetriever, dev: Collection, settings: EvaluationSettings
) -> float:
    """Mean nDCG@10 of a retriever by exact search; all processes call it together.

    Its documents' vectors are kept for this call alone.

    Args:
        retriever: The retriever, with parameters that this process can read.
        dev: The collection.
        settings: The config's section `evaluation`.
    """
    own, encode = retriever.encoder.retriever, retriever.encode
    ids, documents = list(dev.qrels["dev"]), texts_of(dev.corpus)
    queries, is_sparse = [dev.queries[query] for query in ids], own.pooling == SPLADE_POOLING
    with retriever.reporter.progress("dev: documents encoded", len(documents)) as advance:
        if is_sparse:
            sparse = build_sparse(encode, documents, own.module.config.vocab_size, "dev", advance)
            encoded = scipy.sparse.vstack([*sparse_vectors(encode, queries, "query")])
        else:
            sparse, vectors = None, kept_vectors(retriever, documents, advance)
            encoded = encode(queries, "query")

    def measure() -> float:
        index = build_index(vectors, "exact") if sparse is None else sparse
        found = search_named(
            index.search,
            ids,
            encoded,
            ids_of(dev.corpus),
            settings.depth,
            drop_identical_ids=settings.drop_identical_ids,
            excluded=dev.excluded,
            above=0.0 if is_sparse else -math.inf,
        )
        return _mean(found, dev)

    return retriever.processes.once(measure)


def reranker_on_dev(
    encoder: CrossEncoder,
    dev: Collection,
    words: Callable[[], Index],
    settings: EvaluationSettings,
    reporter: Reporter,
    processes: Processes,
) -> Callable[[Any], float]:
    """A cross-encoder's parameters to mean nDCG@10; all processes call that together.

    It ranks again what BM25 finds first for each query, which is searched once, and says, once, how
    many of these pairs are cut.

    Args:
        encoder: The cross-encoder.
        dev: The collection.
        words: BM25's index of its documents.
        settings: The config's section `evaluation`, whose `rerank` says how many are ranked again.
        reporter: Shows progress.
        processes: Those that train together, the first of which ranks.
    """
    depth, queries = settings.rerank.depth, {q: dev.queries[q] for q in dev.qrels["dev"]}
    cut: Counter[bool] = Counter()

    @functools.cache
    def found() -> RunScores:
        return search_named(
            words().search,
            list(queries),
            list(queries.values()),
            list(dev.corpus),
            depth,
            drop_identical_ids=settings.drop_identical_ids,
            excluded=dev.excluded,
            above=0.0,
        )

    @functools.cache  # Pairs are the same each time.
    def tell() -> None:
        say_cut(reporter.say, "reranker, on dev", cut)

    def evaluate(params: Any) -> float:
        params = whole(params)

        def measure() -> float:
            score = functools.partial(
                encoder.scores, params, rows=settings.rerank.rows, cut=cut.update
            )
            with reporter.progress("dev: queries ranked again", len(queries)) as advance:
                again = rank_again(found(), queries, dev.corpus, score, depth, advance)
            tell()
            return _mean(again, dev)

        return processes.once(measure)

    return evaluate


def _mean(found: RunScores, dev: Collection) -> float:
    return metrics.mean(metrics.evaluate(found, dev.qrels["dev"], (CHOSEN_BY,))[CHOSEN_BY])
