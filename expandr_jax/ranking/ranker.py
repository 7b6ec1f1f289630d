"""Ranks the corpus of one data set by any system that needs no training."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from expandr_jax import metrics
from expandr_jax.data.beir import Collection
from expandr_jax.data.records import hash_json
from expandr_jax.expansion.cache import TextCache
from expandr_jax.expansion.expand import Expander, expansion_requests, passage_search
from expandr_jax.expansion.strategies import (
    SEPARATOR,
    STRATEGIES,
    Search,
    Strategy,
    document_message,
)
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.pair import (
    Models,
    RetrieverModel,
    load_models,
    load_retriever_model,
    make_sampler,
)
from expandr_jax.ranking.dense import finish_run
from expandr_jax.ranking.fusion import expanded_query
from expandr_jax.ranking.stages import FEEDBACK_DEPTH, FEEDBACKS, FUSIONS
from expandr_jax.ranking.systems import BM25, System
from expandr_jax.runtime.run import Run
from expandr_jax.search import Index, build_index
from expandr_jax.vectors.corpus import configured_index
from expandr_jax.vectors.encoder import Kind
from expandr_jax.vectors.file import encode_to_file
from expandr_jax.vectors.stored import StoredVectors


class LazyModels:
    """The config's models, each loaded when something first needs it."""

    def __init__(self, run: Run, generates: bool):
        self._run, self._generates = run, generates

    @functools.cached_property
    def both(self) -> Models:
        """Retriever and generator."""
        with self._run.phase("models"), self._run.progress("models loaded", 2) as advance:
            return load_models(self._run.config, advance)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The generator as it samples."""
        run = self._run
        return make_sampler(self.both, run.config, run.processes, run.reporter, run.path("work"))

    @functools.cached_property
    def retriever(self) -> RetrieverModel:
        """The retriever; no generator is loaded where none is used."""
        if self._generates:
            return self.both
        with self._run.phase("models"):
            return load_retriever_model(self._run.config)


class Searched:
    """A corpus as it is searched; each index is built when something first needs it.

    Args:
        run: The config and progress.
        models: The models.
        texts: Of the documents.
        path: Where its vectors go.
    """

    def __init__(self, run: Run, models: LazyModels, texts: Sequence[str], path: pathlib.Path):
        self._run, self._models, self._texts, self._path = run, models, texts, path

    @functools.cached_property
    def bm25(self) -> Index:
        """Of the words."""
        return build_index(self._texts, "bm25")

    @functools.cached_property
    def vectors(self) -> np.ndarray | StoredVectors:
        """[documents, dim], memory-mapped."""
        dtype = self._run.config.retriever.vectors
        model = self._models.retriever
        encoder, params = model.encoder, model.retriever_params
        with self._run.progress("documents encoded", len(self._texts)) as advance:
            return encode_to_file(
                self._path,
                encoder,
                params,
                self._texts,
                "document",
                dtype=dtype,
                progress=advance,
            )

    @functools.cached_property
    def index(self) -> Index:
        """Of the vectors."""
        return configured_index(self.vectors, self._run.config.search)


class Ranker:
    """Ranks one set's corpus by any system; whatever it makes is made once.

    Args:
        run: The config and progress.
        models: The models.
        collection: The set.
        split: Whose judged queries are searched for.
        directory: Where runs and what a restart needs go.
        cache: Where generated texts are kept.
    """

    def __init__(
        self,
        run: Run,
        models: LazyModels,
        collection: Collection,
        split: str,
        directory: pathlib.Path,
        cache: TextCache,
    ):
        self.collection = collection
        self.qrels = self.collection.qrels[split]
        self.ids = list(self.qrels)
        self.queries = [self.collection.queries[query] for query in self.ids]
        self.documents = list(self.collection.corpus)
        self._run, self._models, self._directory = run, models, directory
        self._cache = cache
        self._texts: dict[str, list[list[str]]] = {}
        self._corpora: dict[str | None, Searched] = {}

    def rank(self, system: System) -> dict[str, dict[str, float]]:
        """The system's run, as its file holds it."""
        path = self._directory / "runs" / f"{system.name}.trec"
        if not path.exists():
            # First what it needs, which has phases of its own.
            for part in system.parts:
                self.rank(part)
            if not system.parts:
                self._searched(system.documents)
            if system.strategy:
                self.texts(system.strategy)
            if system.retrievers - {BM25}:
                _ = self._models.retriever
            with self._run.phase(f"{self.collection.name}: {system.name}"):
                metrics.write_trec(path, self._search(system), system.name)
        return metrics.read_trec(path)

    def texts(self, method: str) -> list[list[str]]:
        """The texts of a strategy for each query, step by step; "" where nothing was said."""
        if method not in self._texts:
            config, strategy = self._run.config, STRATEGIES[method]
            limits = config.expansion, config.answer.max_characters
            expander = Expander(strategy, self._models.sampler, *limits, self._passages)
            queries = dict(zip(self.ids, self.queries, strict=True))
            samples = samples_of(config, strategy)
            made = expander.texts(queries, samples, lambda step, r: self._ask(step.name, r))
            self._texts[method] = [[t for several in made[q] for t in several] for q in self.ids]
        return self._texts[method]

    def _search(self, system: System) -> Mapping[str, Mapping[str, float]]:
        config = self._run.config.evaluation
        if system.stage in FUSIONS:
            runs = [self.rank(part) for part in system.parts]
            fuse = FUSIONS[system.stage]
            fused = {query: fuse([run.get(query, {}) for run in runs]) for query in self.ids}
            # A fusion's order is that of its scores, whichever run a document was first met in.
            return {
                query: dict(metrics.rank_documents(scores)[: config.depth])
                for query, scores in fused.items()
            }
        depth = config.depth + config.drop_identical_ids
        if system.retriever == BM25:
            queries = self._with_texts(system, lambda s, q, texts: s.sparse(q, texts))
            scores, indices = self._searched(system.documents).bm25.search(queries, depth)
            run = metrics.make_run(self.ids, self.documents, scores, indices, above=0.0)
        else:
            index = self._searched(system.leaves[0].documents).index
            scores, indices = index.search(self._query_vectors(system), depth)
            run = metrics.make_run(self.ids, self.documents, scores, indices)
        return finish_run(run, config.depth, config.drop_identical_ids)

    def _with_texts(self, system: System, build: Callable[..., Any]) -> list[Any]:
        """`build(strategy, query, texts)` of each query, or the queries where there is none."""
        if system.strategy is None:
            return self.queries
        strategy = STRATEGIES[system.strategy]
        rows = zip(self.queries, self.texts(system.strategy), strict=True)
        return [build(strategy, query, [t for t in texts if t]) for query, texts in rows]

    def _searched(self, documents: str | None) -> Searched:
        """The corpus, its documents expanded where there is a strategy for that."""
        if documents not in self._corpora:
            texts, name = list(self.collection.corpus.values()), "vectors"
            if documents:
                added = self._sample_documents(documents)
                # An empty one adds nothing. A retriever reads max_length tokens of the two.
                texts = [f"{t} {new}".strip() for t, new in zip(texts, added, strict=True)]
                name = f"vectors-{documents}-{hash_json(texts)[:16]}"
            path = self._directory / "work" / f"{name}.npy"
            self._corpora[documents] = Searched(self._run, self._models, texts, path)
        return self._corpora[documents]

    @functools.cached_property
    def _plain(self) -> np.ndarray:
        return self._encode(self.queries, "query")

    def _encode(self, texts: Sequence[str], kind: Kind) -> np.ndarray:
        model = self._models.retriever
        return model.encoder.encode(model.retriever_params, texts, kind)

    def _query_vectors(self, system: System) -> np.ndarray:
        if system.stage in FEEDBACKS:
            return self._after_feedback(system)
        return self._plain if system.strategy is None else self._expanded(system)

    def _after_feedback(self, system: System) -> np.ndarray:
        (part,) = system.parts
        found = self.rank(part)
        place = {document: row for row, document in enumerate(self.documents)}
        depth = min(FEEDBACK_DEPTH, *(len(found.get(query, ())) for query in self.ids))
        queries = self._query_vectors(part)
        if not depth:  # Of a single document, left out for a query with its id.
            return queries
        rows = [[place[d] for d in list(found[query])[:depth]] for query in self.ids]
        vectors = self._searched(part.leaves[0].documents).vectors[np.array(rows)]
        return np.asarray(FEEDBACKS[system.stage](queries, vectors))

    def _expanded(self, system: System) -> np.ndarray:
        (weight,) = self._run.config.evaluation.query_weights
        dense = self._with_texts(system, lambda s, q, texts: s.dense(q, texts, weight))
        places = [(row, i) for row, query in enumerate(dense) for i in range(len(query.texts))]
        if not places:
            return self._plain
        tokenizer = self._models.retriever.retriever.tokenizer
        separator = getattr(tokenizer, "sep_token", None) or ""
        flat = [text.replace(SEPARATOR, separator) for query in dense for text in query.texts]
        encoded = self._encode(flat, STRATEGIES[system.strategy].kind)
        shape = len(dense), max(len(query.texts) for query in dense)
        vectors = np.zeros((*shape, encoded.shape[1]), np.float32)
        present = np.zeros(shape, bool)
        rows, columns = np.array(places).T
        vectors[rows, columns], present[rows, columns] = encoded, True
        weights = np.array([[query.query_weight] for query in dense], np.float32)
        normalize = self._run.config.contrastive.normalize
        return np.asarray(
            expanded_query(self._plain, vectors, present, query_weight=weights, normalize=normalize)
        )

    def _sample_documents(self, name: str) -> list[str]:
        """What the generator writes for each document."""
        most = self._run.config.answer.max_characters
        messages = {
            document: document_message(name, text, most, self._models.sampler.fits)
            for document, text in self.collection.corpus.items()
        }
        requests = expansion_requests(self._run.config.expansion, messages, 1)
        texts = self._ask(name, requests)
        return [texts[document, 0] for document in self.documents]

    def _ask(self, name: str, requests: Sequence[Request]) -> dict[tuple[str, int], str]:
        timed = self._run.phase(f"{self.collection.name}: texts of {name}")
        return self._cache.texts(self._models.sampler, name, requests, timed)

    @functools.cached_property
    def _passages(self) -> Callable[[Search, Mapping[str, str], int], dict[str, list[str]]]:
        """Finds what prompts show."""
        searched, drop = self._searched(None), self._run.config.evaluation.drop_identical_ids

        def dense(queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
            return searched.index.search(self._encode(queries, "query"), k)

        indexes = {"bm25": lambda queries, k: searched.bm25.search(queries, k), "dense": dense}
        return passage_search(self.collection.corpus, indexes, drop_identical_ids=drop)


def samples_of(config: ml_collections.ConfigDict, strategy: Strategy) -> int:
    """How often each of a strategy's requests is made: as the config says, or else its authors."""
    return config.evaluation.samples[0] or strategy.samples
