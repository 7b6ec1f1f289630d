"""One set of `eval.beir`: its corpus as it is searched, and what is written for its queries."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from expandr_jax.data.beir import Collection
from expandr_jax.data.documents import texts_of, write_documents
from expandr_jax.data.training_data import limit_queries
from expandr_jax.expansion.cache import kept_texts
from expandr_jax.expansion.combine import DEV, MEAN, WAYS
from expandr_jax.expansion.expand import expansion_requests, make_expander
from expandr_jax.expansion.sampled import MadeWhenAsked
from expandr_jax.expansion.strategies import STRATEGIES, document_message
from expandr_jax.files.records import hash_json_list, read_jsonl, write_jsonl
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.loading import (
    load_models,
    load_retriever_model,
    make_sampler,
    sparse_corpus,
)
from expandr_jax.metrics import Judgements
from expandr_jax.pair import Models, RetrieverModel, model_hashes
from expandr_jax.ranking.choices import (
    Choice,
    Chosen,
    DevChoices,
    best_of,
    stage_grid,
)
from expandr_jax.ranking.listwise import ListRanker, list_ranker
from expandr_jax.ranking.ranker import Expansions, Ranker, Searches
from expandr_jax.ranking.systems import EXPANSION, UNTRAINED, System
from expandr_jax.runtime.run import Run
from expandr_jax.search import kept_bm25
from expandr_jax.vectors.corpus import CorpusRetriever


class LazyModels:
    """The config's models, each loaded when something first needs it."""

    def __init__(self, run: Run, generates: bool):
        self._run, self._generates = run, generates

    @functools.cached_property
    def both(self) -> Models:
        """Retriever and generator."""
        with self._run.phase("models"), self._run.reporter.progress("models loaded", 2) as advance:
            models = load_models(self._run.config, advance)
        self._run.check_models(model_hashes(models))
        return models

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
            model = load_retriever_model(self._run.config)
        self._run.check_models(model_hashes(model))
        return model


class SetRanker:
    """Ranks one set's corpus by any system; whatever it makes is made once.

    Args:
        run, models, collection: What it is made with, and of.
        split: Whose judged queries are searched for.
        directory: Where runs and what a restart needs go.
        cache: Where generated texts are kept.

    Attributes:
        ranker: Ranks it.
        choices: What is chosen for it on its dev queries, if it has any.
        queries: Query id -> text, of the split.
    """

    def __init__(
        self,
        run: Run,
        models: LazyModels,
        collection: Collection,
        split: str,
        directory: pathlib.Path,
        cache: pathlib.Path,
    ):
        self.queries = {query: collection.queries[query] for query in collection.qrels[split]}
        self._run, self._models, self._cache = run, models, cache
        self._collection, self._directory = collection, directory
        self._retrievers: list[CorpusRetriever] = []
        self._documents = functools.cache(self._expanded_documents)
        self._bm25 = functools.cache(
            lambda documents: kept_bm25(
                directory / "work",
                self._document_texts(documents),
                name=f"bm25-{documents}" if documents else "bm25",
                reporter=run.reporter,
            )
        )
        self._dense = functools.cache(self._search_by_vectors)
        self._sparse = functools.cache(
            lambda documents: sparse_corpus(
                run.config, self._document_texts(documents), directory / "work", run.reporter
            )
        )
        self._written = functools.cache(self._write)
        self._split = split
        self.ranker = self._ranker(
            self.queries,
            self.expansions,
            directory=directory / "runs",
            timed=lambda system: run.phase(f"{collection.name}: {system.name}"),
        )

    def release(self) -> None:
        """Lets go of what was searched by vectors; how many texts were cut is said then."""
        for retriever in self._retrievers:
            retriever.release()

    def expansions(self, leaf: System) -> Expansions:
        """What is written for each query by a leaf's strategy."""
        return self._written(leaf.strategy)

    @functools.cached_property
    def choices(self) -> DevChoices:
        """What is chosen on the set's dev queries, or was before a restart."""
        path = self._directory / "evaluation" / "choices.jsonl"
        tried = [row for _, row in read_jsonl(path, {"system": str})] if path.exists() else []
        return DevChoices(
            lambda: self._dev,
            self._dev_qrels,
            self._tried,
            made=best_of(tried),
            tried=tried,
            say=lambda text: self._run.reporter.say(f"{self._collection.name}: {text}"),
            keep=functools.partial(write_jsonl, path),
        )

    @functools.cached_property
    def _dev_qrels(self) -> Judgements:
        """Judgements of the dev queries; none where there are none, or these are tested."""
        if self._split == "dev":
            return {}
        qrels = self._collection.qrels.get("dev", {})
        judged = [query for query, grades in qrels.items() if any(g > 0 for g in grades.values())]
        return {
            query: qrels[query] for query in limit_queries(judged, self._run.config.data.max_dev)
        }

    @functools.cached_property
    def _dev(self) -> Ranker:
        queries = {query: self._collection.queries[query] for query in self._dev_qrels}
        return self._ranker(queries, lambda leaf: self._written(leaf.strategy, "dev"))

    def _ranker(
        self,
        queries: Mapping[str, str],
        expansions: Callable[[System], Expansions],
        **options: Any,
    ) -> Ranker:
        config = self._run.config
        return Ranker(
            queries,
            Searches(
                self._bm25,
                self._dense,
                self._collection.corpus,
                self._sparse,
                self._document_texts,
            ),
            expansions,
            self._choice,
            config.evaluation,
            excluded=self._collection.excluded,
            lists=lambda: self._lists,
            say=self._run.reporter.say,
            **options,
        )

    @functools.cached_property
    def _lists(self) -> ListRanker:
        settings = self._run.config.evaluation.listwise
        return list_ranker(self._models.sampler, settings, self._cache)

    def _write(self, name: str, split: str = "") -> Expansions:
        config = self._run.config
        expander = make_expander(
            config.expansion,
            self._models.sampler,
            self._collection.corpus,
            lambda *asked: self._bm25(None).search(*asked),
            lambda *asked: self._dense(UNTRAINED, None).find(*asked),
            most_characters=config.answer.max_characters,
            drop_identical_ids=config.evaluation.drop_identical_ids,
            excluded=self._collection.excluded,
        )
        chosen = expander.strategy if name == EXPANSION else STRATEGIES[name]
        expander = dataclasses.replace(expander, strategy=chosen)
        samples = config.evaluation.samples[0] or chosen.samples
        known = self._collection.queries
        queries = {query: known[query] for query in self._dev_qrels} if split else self.queries
        made = expander.texts(queries, samples, lambda step, r: self._ask(step.name, r))
        return Expansions(chosen, [made[query] for query in queries])

    def _choice(self, system: System) -> Chosen | None:
        """All texts, with the weight that the config has; what a fusion's parts weigh, by dev."""
        return self.choices(system) if system.parts or self._chooses else self._fixed(system)

    @property
    def _chooses(self) -> bool:
        """Whether it is chosen on dev how the texts of a leaf count."""
        return self._run.config.expansion.combine == DEV and bool(self._dev_qrels)

    def _fixed(self, leaf: System, way: str | None = None) -> Choice:
        """All texts of a leaf, with the weight and, without a way, in the way the config has."""
        config = self._run.config
        if way is None:
            way = MEAN if config.expansion.combine == DEV else config.expansion.combine
        (weight,) = config.evaluation.query_weights
        return Choice(weight, len(self.expansions(leaf).by_sample[0]), way)

    def _tried(self, system: System) -> list[Chosen]:
        """What is tried for a system on dev; nothing where there are no dev queries."""
        if not system.parts:
            return [self._fixed(system, way) for way in WAYS] if self._chooses else []
        return stage_grid(system, self._run.config.evaluation) if self._dev_qrels else []

    def _ask(self, name: str, requests: Iterable[Request]) -> dict[tuple[str, int], str]:
        timed = self._run.phase(f"{self._collection.name}: texts of {name}")
        return kept_texts(self._cache, self._models.sampler, name, requests, timed)

    def _document_texts(self, documents: str | None) -> Sequence[str]:
        return texts_of(self._documents(documents))

    def _expanded_documents(self, documents: str | None) -> Mapping[str, str]:
        """Each document followed by what is written for it; an empty text adds nothing."""
        corpus = self._collection.corpus
        if not documents:
            return corpus
        most, fits = self._run.config.answer.max_characters, self._models.sampler.fits
        messages = MadeWhenAsked(
            corpus, lambda i: document_message(documents, corpus[i], most, fits)
        )
        added = self._ask(documents, expansion_requests(self._run.config.expansion, messages, 1))
        # A retriever reads max_length tokens of the two.
        rows = ((i, f"{text} {added[i, 0]}".strip()) for i, text in corpus.items())
        # Made anew by each start, so that a bucket does not get them.
        return write_documents(rows, self._directory / "work" / f".documents-{documents}")

    def _search_by_vectors(self, _: str, documents: str | None) -> CorpusRetriever:
        """The config's retriever, the only one that there is."""
        texts, name = self._collection.corpus, "vectors"
        if documents:
            texts = self._documents(documents)
            name = f"vectors-{documents}-{hash_json_list(texts_of(texts))[:16]}"
        model, run = self._models.retriever, self._run
        found = CorpusRetriever(
            model.encoder,
            model.retriever_params,
            texts,
            self._directory / "work" / f"{name}.npy",
            dtype=run.config.retriever.vectors,
            search=run.config.search,
            processes=run.processes,
            reporter=run.reporter,
            shares=self._directory / "work" / "shares",
            normalize=model.normalize,
            timed=functools.partial(run.phase, f"{self._collection.name}: encode {name}"),
        )
        _ = found.corpus.evaluated  # Encoded by now, so that only the search is timed.
        self._retrievers.append(found)
        return found
