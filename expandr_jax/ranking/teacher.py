"""The teacher of distilled expansion, and its student, as dev ranks them.

The teacher is a retriever with the passages that a trained generator writes for a query; the
student encodes plain queries. Both search the same vectors of the documents.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.data.beir import Collection
from expandr_jax.expansion.combine import MEAN
from expandr_jax.expansion.strategies import Strategy
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.ranking.choices import Choice, DevChoices, expansion_grid
from expandr_jax.ranking.ranker import Ranker
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.ranking.sources import Expansions, Searches
from expandr_jax.ranking.systems import DISTILLED, OURS, parse_system
from expandr_jax.runtime.processes import Processes
from expandr_jax.search import Index
from expandr_jax.sharding import whole
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.file import encode_to_file
from expandr_jax.vectors.together import Known, encode_together, progress_of_all

TAUGHT_AT_ONCE = 1024  # Queries whose texts' vectors are in memory together.
TEACHER, STUDENT = parse_system(OURS), parse_system(DISTILLED)


def _ranker(
    queries: Mapping[str, str],
    retriever: CorpusRetriever,
    settings: EvaluationSettings,
    expansions: Expansions | None = None,
    **options: Any,
) -> Ranker:
    """Ranks a retriever's documents for queries; options are the ranker's."""
    searches = Searches(lambda _: None, lambda *_: retriever, retriever.texts)
    return Ranker(queries, searches, lambda _: expansions, lambda _: None, settings, **options)


def best_use(
    retriever: CorpusRetriever,
    collection: Collection,
    expansions: Expansions,
    settings: EvaluationSettings,
    samples: Sequence[int] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Choice | None:
    """How the teacher uses its passages, by dev as in the evaluation; None but in process 0.

    Its mean of vectors, whatever `expansion.combine` is: a student learns one vector. All processes
    call it together.

    Args:
        retriever: The teacher's.
        collection: Has the dev queries.
        expansions: What was written for them, in their order.
        settings: The config's section `evaluation`.
        samples: How many passages are averaged, each tried; (): as the settings have it.
        say: Told what is chosen.
    """
    judged, is_main = collection.qrels["dev"], retriever.processes.is_main
    dev = {query: collection.queries[query] for query in judged}
    options = {"is_main": is_main, "excluded": collection.excluded}
    ranker = _ranker(dev, retriever, settings, expansions, **options)
    tried = dataclasses.replace(settings, samples=tuple(samples) or settings.samples)
    grid = expansion_grid(tried, MEAN, len(expansions.strategy.asks))
    choices = DevChoices(lambda: ranker, judged, lambda _: grid, made={}, say=say, is_main=is_main)
    _ = retriever.corpus
    return choices(TEACHER)


def student_on_dev(
    retriever: CorpusRetriever, params: Any, collection: Collection, settings: EvaluationSettings
) -> float:
    """nDCG@10 of the dev queries with a student; all processes call it together.

    Args:
        retriever: The teacher's, whose documents are searched.
        params: The student's parameters.
        collection: Has the dev queries.
        settings: The config's section `evaluation`.
    """
    student = dataclasses.replace(retriever, params=whole(params), documents=retriever)
    judged, processes = collection.qrels["dev"], retriever.processes
    queries = {query: collection.queries[query] for query in judged}
    options = {"is_main": processes.is_main, "excluded": collection.excluded}
    ranker = _ranker(queries, student, settings, **options)
    _ = retriever.corpus
    found, value = ranker.search(STUDENT, None), 0.0
    if processes.is_main:
        value = metrics.mean(metrics.evaluate(found, judged, (CHOSEN_BY,))[CHOSEN_BY])
    return processes.once(lambda: value)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What a student learns from: the vectors of expanded queries.

    Attributes:
        retriever: Encodes queries and passages.
        strategy: Says what becomes of passages.
        choice: How they are used, from `best_use`.
        settings: The config's section `evaluation`.
    """

    retriever: CorpusRetriever
    strategy: Strategy
    choice: Choice
    settings: EvaluationSettings

    def vectors(
        self, queries: Mapping[str, str], texts: Mapping[str, list[list[str]]]
    ) -> np.ndarray:
        """[queries, dim] vectors of unit length; `texts` has each one's passages, by `Ask`."""
        alone = dataclasses.replace(self.retriever, processes=Processes())
        expansions = Expansions(self.strategy, [texts[query] for query in queries])
        found = _ranker(queries, alone, self.settings, expansions).query_vectors(
            TEACHER, self.choice
        )
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def write(
        self,
        path: pathlib.Path,
        queries: Mapping[str, str],
        texts: Mapping[str, list[list[str]]],
        advance: Callable[[float], None],
    ) -> None:
        """Writes `vectors` to a file, a block at a time, or goes on.

        All processes call it together, and each makes those of a share.
        """
        every, ours = [*queries], self.retriever
        used = [*dataclasses.astuple(self.choice), ours.normalize]

        def encode(to: pathlib.Path, share: slice, known: Known | None) -> None:
            tell = progress_of_all(advance, share, len(every))

            def vectors(first: int, last: int) -> np.ndarray:
                some = {query: queries[query] for query in every[share][first:last]}
                found = self.vectors(some, texts)
                tell(len(some))
                return found

            # What the vectors are of, so that a file of other passages, or of another use of them,
            # is found to be one.
            described = (json.dumps([queries[query], used, texts[query]]) for query in every[share])
            encode_to_file(
                to, ours.encoder, ours.params, described, "query", block=TAUGHT_AT_ONCE,
                vectors=known or vectors,
            )  # fmt: skip

        encode_together(path, len(every), ours.processes, encode)


def found_by_teacher(
    index: Index, targets: Any, depth: int, advance: Callable[[int], None]
) -> np.ndarray:
    """[queries, depth] int32 rows of the documents that each of `Teacher.vectors` finds first."""
    rows = []
    for first in range(0, len(targets), TAUGHT_AT_ONCE):
        block = np.asarray(targets[first : first + TAUGHT_AT_ONCE], np.float32)
        rows.append(index.search(block, depth)[1])
        advance(len(block))
    return np.concatenate(rows).astype(np.int32)
