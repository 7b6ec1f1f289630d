"""Ranks a corpus by any system: retrieve, then feedback, fuse or rank again."""

import collections
import contextlib
import functools
import json
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.data.documents import ids_of, rows_of, texts_of
from expandr_jax.expansion.combine import MEAN
from expandr_jax.expansion.strategies import SEPARATOR
from expandr_jax.files.records import write_json
from expandr_jax.metrics import RunScores
from expandr_jax.models.cross_encoder import say_cut
from expandr_jax.ranking.choices import Choice, Chosen, Depth, PartWeights
from expandr_jax.ranking.gate import Features, Gate
from expandr_jax.ranking.gate_features import (
    AFTER,
    GATES,
    PlainSearch,
    Written,
    features_after,
    features_before,
)
from expandr_jax.ranking.listwise import LISTWISE, ListRanker
from expandr_jax.ranking.rerank import RERANKERS, Scorer, rank_again
from expandr_jax.ranking.separate import SeparateSearches
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.ranking.sources import Expansions, Searches
from expandr_jax.ranking.stages import (
    FEEDBACK_DEPTH,
    FEEDBACKS,
    FUSIONS,
    WEIGHED_FUSIONS,
    WEIGHINGS,
    WORD_FEEDBACK_DEPTH,
    WORD_FEEDBACKS,
)
from expandr_jax.ranking.systems import AGAIN, BM25, BY_TEXTS, System
from expandr_jax.ranking.words import Weights
from expandr_jax.search import search_named, words_of
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.query import EncodedQueries, fuse

RECALL_QUERIES = 100  # Queries by which an index's recall is estimated.


class Ranker:
    """Ranks one corpus for the queries of one split.

    All processes call the same methods in the same order: they encode together, and process 0 alone
    searches.

    Args:
        queries: Query id -> text.
        searches: The corpus.
        expansions: A leaf with a strategy to what was written for its queries, in their order.
        choice: A leaf with a strategy to how it uses that, a fusion to what its parts weigh, None:
            all the same; None in other processes than 0.
        settings: The config's section `evaluation`.
        runs: Those that were made before, by system.
        directory: Where runs are kept, a file each, and found again; None: in memory.
        timed: What a system is searched within.
        is_main: Whether this is process 0.
        excluded: Query id -> documents that leave its rankings before these are cut.
        lists: What ranks lists again; called where a system needs it, in process 0.
        say: Tells the user what re-rankers do not read.

    Attributes:
        ids: The queries' ids.
        answers: Listwise system that it has ranked -> what `ListRanker.rank` counts.
        chances: Gated system that it has ranked -> query -> probability that expanding helps.
    """

    def __init__(
        self,
        queries: Mapping[str, str],
        searches: Searches,
        expansions: Callable[[System], Expansions],
        choice: Callable[[System], Chosen | None],
        settings: EvaluationSettings,
        *,
        runs: Mapping[str, RunScores] | None = None,
        directory: pathlib.Path | None = None,
        timed: Callable[[System], contextlib.AbstractContextManager] = contextlib.nullcontext,
        is_main: bool = True,
        excluded: Mapping[str, Collection[str]] | None = None,
        lists: Callable[[], ListRanker] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.ids = list(queries)
        self.answers: dict[str, dict[str, int]] = {}
        self.chances: dict[str, dict[str, float]] = {}
        self._queries, self._searches = list(queries.values()), searches
        self._expansions, self._choice = expansions, choice
        self._settings = settings
        self._directory, self._runs = directory, dict(runs or {})
        self._timed, self._is_main, self._excluded = timed, is_main, excluded
        self._lists, self._say = lists, say
        self._separate = SeparateSearches(self.ids, searches, settings, excluded)
        # By re-rankers, each a stage, where depths are tried: of queries and texts.
        self._scored: dict[tuple[str, str, str], float] = {}
        self._encoded: dict[tuple[str, ...], EncodedQueries] = {}

    def rank(self, system: System) -> RunScores:
        """The system's run, as a file of it has it; empty in other processes than 0."""
        path = self._directory / f"{system.name}.trec" if self._directory else None
        counted = path.with_suffix(".answers.json") if path else None
        if system.name not in self._runs and not (path and path.exists()):
            for part in system.parts:
                self.rank(part)
            choice = self._chosen(system)
            self._dense(system)  # Made by now, so that only the search is timed.
            with self._timed(system):
                run = self.search(system, choice)
                if path:
                    if system.stage == LISTWISE:
                        write_json(counted, self.answers[system.name])
                    metrics.write_trec(path, run, system.name)
                else:
                    self._runs[system.name] = metrics.as_written(run)
        if counted and counted.exists():
            self.answers[system.name] = json.loads(counted.read_text(encoding="utf-8"))
        return metrics.read_trec(path) if path else self._runs[system.name]

    def search(self, system: System, choice: Chosen | None) -> RunScores:
        """What `rank` ranks, its parts being ranked, with expansions or parts used so."""
        dense, settings = self._dense(system), self._settings
        queries = self.query_vectors(system, choice) if dense else None
        features = self.features(system) if system.stage in GATES else None
        if not self._is_main:
            return {}
        if features is not None:
            return self._gated(system, choice, features)
        if isinstance(choice, Choice) and choice.combine != MEAN:
            expansions = self._expansions(system)
            used = self._used(expansions, choice)
            encoded = self.encoded(system) if dense else None
            return self._separate.rank(system, choice, expansions, used, encoded)
        if system.stage in FUSIONS:
            return self._fused(system, choice)
        if system.stage in AGAIN:
            return self._ranked_again(system, choice)
        if dense:
            find, documents = dense.corpus.evaluated.search, dense.corpus.ids
        else:
            find, queries = self._search_for_words(system, choice)
            documents = ids_of(self._searches.corpus)
        return search_named(
            find,
            self.ids,
            queries,
            documents,
            settings.depth,
            drop_identical_ids=settings.drop_identical_ids,
            excluded=self._excluded,
            above=-np.inf if dense else 0.0,
        )

    def _ranked_again(self, system: System, choice: Chosen | None) -> RunScores:
        settings = getattr(self._settings, system.stage)
        depth = choice.depth if isinstance(choice, Depth) else settings.depth
        texts = dict(zip(self.ids, self._queries, strict=True))
        asked = self.rank(system.parts[0]), texts, self._searches.corpus
        if system.stage == LISTWISE:
            run, self.answers[system.name] = self._lists().rank(*asked, depth)
            return run
        cut: collections.Counter[bool] = collections.Counter()
        score = RERANKERS[system.stage].load(settings, cut.update)
        if settings.depths:
            score = self._remembered(score, system.stage)
        run = rank_again(*asked, score, depth)
        say_cut(self._say, system.name, cut)
        return run

    def _remembered(self, score: Scorer, stage: str) -> Scorer:
        """A re-ranker that reads a pair once, though several depths are tried."""

        def scores(query: str, documents: Sequence[str]) -> np.ndarray:
            new = [text for text in documents if (stage, query, text) not in self._scored]
            for text, one in zip(new, score(query, new) if new else (), strict=True):
                self._scored[stage, query, text] = one
            return np.array([self._scored[stage, query, text] for text in documents], np.float32)

        return scores

    def index_recall(self, system: System) -> dict[str, Any] | None:
        """What the index that a system's vectors are searched by finds of what there is to find.

        All processes call it, once the system is ranked.

        Returns:
            {"system", "queries", "recall@DEPTH"}, over `RECALL_QUERIES` of them at most; None where
            all documents are scored, or no vectors searched, and in other processes than 0.
        """
        dense = self._dense(system)
        if dense is None or not dense.corpus.misses_some:
            return None
        queries = self.query_vectors(system, self._chosen(system))
        if not self._is_main:
            return None
        count, depth = min(RECALL_QUERIES, len(queries)), self._settings.depth
        sample = np.linspace(0, len(queries) - 1, count).astype(int)
        recall = round(dense.corpus.recall(queries[sample], depth), 6)
        return {"system": system.name, "queries": count, f"recall@{depth}": recall}

    def encoded(self, leaf: System) -> EncodedQueries:
        """Vectors of the queries and of all that was written for them, by a leaf's retriever."""
        key = leaf.retriever, leaf.generator, leaf.strategy
        if any(retriever != leaf.retriever for retriever, *_ in self._encoded):
            self._encoded.clear()  # Vectors of one retriever are in memory, not those of all.
        if key not in self._encoded:
            search = self._dense(leaf)
            plain = self._encoded.get((leaf.retriever, None, None))
            if plain is None:
                plain = EncodedQueries(self.ids, search.encode(self._queries, "query", self.ids))
                self._encoded[leaf.retriever, None, None] = plain
            if leaf.strategy:
                self._encoded[key] = self._with_texts(plain, self._expansions(leaf), search)
        return self._encoded[key]

    def features(self, gated: System) -> Features:
        """What a gate reads of each query, its parts being ranked; {} in other processes than 0.

        All processes call it together.
        """
        expanded = gated.parts[1]
        encoded = self.encoded(expanded) if gated.stage == AFTER else None
        if not self._is_main:
            return {}
        index, runs = self._searches.bm25(None), [self.rank(part) for part in gated.parts]
        written = self._written(expanded, encoded, runs[1]) if encoded else None
        features = {}
        for number, words in enumerate(words_of(self._queries)):
            plain, _, by_words = (run.get(self.ids[number], {}) for run in runs)
            frequencies = [index.frequency(word) for word in words]
            search = PlainSearch(plain, by_words, frequencies, index.size)
            features[self.ids[number]] = (
                features_after(search, written[number]) if written else features_before(search)
            )
        return features

    def _written(self, leaf: System, encoded: EncodedQueries, run: RunScores) -> list[Written]:
        """What a gate reads of a leaf's passages, those that it uses, for each query."""
        expansions, choice = self._expansions(leaf), self._chosen(leaf)
        columns = expansions.columns(choice.samples)
        return [
            Written(
                encoded.queries[number],
                encoded.expansions[number, columns][encoded.present[number, columns]],
                [*map(len, words_of(texts))],
                run.get(self.ids[number], {}),
                expansions.used_log_probs(number, columns),
            )
            for number, (_, texts) in enumerate(self._used(expansions, choice))
        ]

    def _gated(self, system: System, gate: Gate, features: Features) -> RunScores:
        """Each query's run, of one part or of the other; `chances` says why."""
        plain, expanded, _ = (self.rank(part) for part in system.parts)
        chances = {query: gate.probability(features[query]) for query in self.ids}
        self.chances[system.name] = chances
        return {
            query: (expanded if chance >= gate.threshold else plain).get(query, {})
            for query, chance in chances.items()
        }

    def _chosen(self, system: System) -> Chosen | None:
        return self._choice(system) if system.is_chosen else None

    def _dense(self, system: System) -> CorpusRetriever | None:
        """The corpus that a leaf, or feedback on one, searches by vectors; None for others."""
        leaf = system.leaves[0]
        if leaf.retriever in BY_TEXTS or system.stage not in (None, *FEEDBACKS):
            return None
        return self._searches.dense(leaf.retriever, leaf.documents)

    def _with_texts(
        self, plain: EncodedQueries, expansions: Expansions, search: CorpusRetriever
    ) -> EncodedQueries:
        """The encoded queries `plain` with the vectors of their texts, [queries, texts, dim]."""
        strategy, texts = expansions.strategy, expansions.by_sample
        present = np.array([[bool(text) for text in several] for several in texts])
        flat, names = [], []
        for query_id, query, several in zip(self.ids, self._queries, texts, strict=True):
            read = strategy.dense(query, [text for text in several if text], 0.0).texts
            flat += [text.replace(SEPARATOR, search.separator) for text in read]
            names += [f"expansions of {query_id}"] * len(read)
        vectors = np.zeros((*present.shape, plain.queries.shape[1]), np.float32)
        if flat:
            vectors[present] = search.encode(flat, strategy.kind, names)
        return EncodedQueries(self.ids, plain.queries, vectors, present)

    def query_vectors(self, system: System, choice: Choice | None) -> np.ndarray | None:
        """[queries, dim] of a leaf or of feedback; None in other processes than 0."""
        if system.stage in FEEDBACKS:
            return self._after_feedback(system)
        encoded = self.encoded(system)
        if not self._is_main:
            return None
        if not system.strategy:
            return encoded.queries
        expansions = self._expansions(system)
        columns = expansions.columns(choice.samples)
        weights = [
            [expansions.strategy.dense(query, texts, choice.query_weight).query_weight]
            for query, texts in self._used(expansions, choice)
        ]
        return np.asarray(
            fuse(
                encoded.queries,
                encoded.expansions[:, columns],
                encoded.present[:, columns],
                query_weight=np.array(weights, np.float32),
                normalize=self._dense(system).normalize,
            )
        )

    def _search_for_words(self, system: System, choice: Choice | None) -> tuple[Any, Any]:
        """How BM25 searches for a leaf's queries, or after feedback on them, and for what."""
        index = self._searches.by_texts(system.leaves[0])
        if system.stage is None and system.weighing == BM25:
            return index.search, self._words(system, choice)  # As texts: their words count alike.
        return index.search_weighted, self._weights(system, choice)

    def _weights(self, system: System, choice: Choice | None) -> list[Weights]:
        """The weights of the words of each query that BM25 searches for."""
        (leaf,) = system.leaves
        index = self._searches.bm25(leaf.documents)
        if system is leaf:
            weigh = WEIGHINGS[leaf.weighing]
            return [weigh(words, index) for words in words_of(self._words(leaf, choice))]
        (part,) = system.parts
        queries = self._weights(part, self._chosen(part))
        found, move = self.rank(part), WORD_FEEDBACKS[system.stage]
        rows = rows_of(self._searches.corpus)
        read = self._searches.texts
        texts = read(leaf.documents) if read else texts_of(self._searches.corpus)
        moved = []
        for query_id, query in zip(self.ids, queries, strict=True):
            first = list(found.get(query_id, {}).items())[:WORD_FEEDBACK_DEPTH]
            words = words_of([texts[rows[document]] for document, _ in first])
            scores = [score for _, score in first]
            moved.append(move(query, list(zip(scores, words, strict=True)), index))
        return moved

    def _words(self, leaf: System, choice: Choice | None) -> list[str]:
        """What BM25 searches for, for each query."""
        if not leaf.strategy:
            return self._queries
        expansions = self._expansions(leaf)
        used = self._used(expansions, choice)
        return [expansions.strategy.sparse(query, texts) for query, texts in used]

    def _used(self, expansions: Expansions, choice: Choice) -> list[tuple[str, list[str]]]:
        """Each query with those of its texts that are used."""
        columns = expansions.columns(choice.samples)
        return [
            (query, [several[column] for column in columns if several[column]])
            for query, several in zip(self._queries, expansions.by_sample, strict=True)
        ]

    def _after_feedback(self, system: System) -> np.ndarray | None:
        (part,) = system.parts
        queries, found = self.query_vectors(part, self._chosen(part)), self.rank(part)
        if not self._is_main:
            return None
        corpus = self._dense(part).corpus
        row = rows_of(self._searches.corpus)
        moved = queries.copy()
        # Each query moves towards what it found, those that found as many together. It may be none:
        # a single document is left out for a query with its id.
        by_depth = collections.defaultdict(list)
        for number, query in enumerate(self.ids):
            by_depth[min(FEEDBACK_DEPTH, len(found.get(query, ())))].append(number)
        for depth in by_depth.keys() - {0}:
            of = by_depth[depth]
            rows = [[row[d] for d in list(found[self.ids[i]])[:depth]] for i in of]
            moved[of] = FEEDBACKS[system.stage](queries[of], corpus.vectors[np.array(rows)])
        return moved

    def _fused(self, system: System, weights: PartWeights | None) -> RunScores:
        combine, runs = FUSIONS[system.stage], [self.rank(part) for part in system.parts]
        if weights is not None:
            combine = functools.partial(WEIGHED_FUSIONS[system.stage], weights=weights.weights)
        fused = {query: combine([run.get(query, {}) for run in runs]) for query in self.ids}
        # A fusion's order is that of its scores, whichever run a document was first met in.
        return {
            query: dict(metrics.rank_documents(scores)[: self._settings.depth])
            for query, scores in fused.items()
        }
