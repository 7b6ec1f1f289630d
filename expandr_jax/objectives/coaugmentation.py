"""On-policy training of texts for queries and documents together: what is asked, and rewards."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.documents import ids_of
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.strategies import SEPARATOR, document_message
from expandr_jax.files.records import hash_json
from expandr_jax.generation.sampler import Sampler
from expandr_jax.objectives.rollouts import Beside, Score
from expandr_jax.objectives.settings import GrpoSettings
from expandr_jax.rewards.coaugmentation import (
    coaugmentation_rewards,
    draw_documents,
    drawn_versions,
)
from expandr_jax.rewards.evidence import RewardContext
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.searches import REWARD_SEARCHES
from expandr_jax.runtime.processes import Processes
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.query import fuse_each

# Texts are drawn by a group's id: a document's begins with this, and no query's may.
DOCUMENT = "document/"
PROBE = 2**31  # What the probe draws by: no step has this number.


def check_documents(settings: GrpoSettings, section: str, data: TrainingData) -> None:
    """Refuses `documents` that the collection cannot give, or cannot be told from queries."""
    documents, corpus = settings.queries * settings.documents, data.collection.corpus
    if documents > len(corpus):
        raise UserError(
            f"{section}.documents {settings.documents}, with {settings.queries} queries a step: "
            f"there are {len(corpus)} documents"
        )
    named = [q for q in data.generator_train if settings.documents and q.startswith(DOCUMENT)]
    if named:
        raise UserError(
            f"{section}.documents: the id of query {named[0]!r} begins as documents are named"
        )


def documents_beside(
    data: TrainingData, settings: GrpoSettings, sampler: Sampler, most: int
) -> Beside:
    """The documents beside the queries of a step, and what the generator is asked of each.

    Args:
        data: Has the documents, and which are relevant to whom.
        settings: The config's section `grpo`.
        sampler: Its seed draws the documents, and it knows what fits a prompt.
        most: Characters of a document in a prompt, at most.
    """
    corpus = data.collection.corpus

    def draw(queries: Sequence[str], step: int) -> list[Group]:
        each = min(settings.documents, len(corpus) // max(1, len(queries)))
        drawn = draw_documents(data, queries, each, sampler.seed, step)
        return [document_group(data, document) for document in drawn]

    def message(group: Group) -> str:
        return document_message(settings.document_prompt, group.query, most, sampler.fits)

    return Beside(draw, message, document_group(data, ids_of(corpus)[0]), PROBE)


def document_group(data: TrainingData, document: str) -> Group:
    """The group of a document, which has no texts yet."""
    name, text = f"{DOCUMENT}{document}", data.collection.corpus[document]
    return Group(name, text, document, "", [], is_document=True)


def score_together(
    context: RewardContext,
    retriever: CorpusRetriever,
    document_weights: tuple[float, float],
    processes: Processes,
) -> Score:
    """What rewards the texts of a step's queries and documents; all processes call it together.

    A query is searched for as the strategy's authors have it, and a document found by its text
    followed by what was written for it: as `eval.beir` ranks dense@d2e+q2e.

    Args:
        context: What texts are judged by; its corpus is not looked at.
        retriever: Encodes them, where they are searched by vectors.
        document_weights: What a document's group counts: one that is relevant to a query of the
            step, any other.
        processes: Those of the run, of which the first one searches for words and judges.
    """
    settings = context.settings
    by_vectors = REWARD_SEARCHES[settings.search].vectors

    def score(groups: Sequence[Group]) -> tuple[list[Group], Mapping[str, float]]:
        begin = time.perf_counter()
        queries = [group for group in groups if not group.is_document]
        documents = [group for group in groups if group.is_document]
        vectors = vector_scores(context, retriever, queries, documents) if by_vectors else None
        between = time.perf_counter()

        def rewards() -> list[Any]:
            scores = word_scores(context, queries, documents) if vectors is None else vectors
            grades = _grades(context.data, queries, documents)
            names = hash_json([group.query_id for group in groups])
            sizes = len(documents), scores.shape[3], settings.group_sets
            draws = drawn_versions(*sizes, context.seed, int(names[:8], 16))
            of_queries, of_documents = coaugmentation_rewards(scores, grades, draws)
            weights = np.where(grades.any(axis=0), *document_weights)
            return [of_queries.tolist(), of_documents.tolist(), weights.tolist()]

        of_queries, of_documents, weights = processes.once(rewards)
        spent = between - begin, time.perf_counter() - between

        def terms(name: str, row: Sequence[float]) -> list[tuple[float, dict[str, float]]]:
            return [(settings.group * reward, {name: reward}) for reward in row]

        made = [
            *(g.rewarded(terms("query", row)) for g, row in zip(queries, of_queries, strict=True)),
            *(dataclasses.replace(g.rewarded(terms("document", row)), weight=weight)
              for g, row, weight in zip(documents, of_documents, weights, strict=True)),
        ]  # fmt: skip
        return made, dict(zip(("encoding_seconds", "search_seconds"), spent, strict=True))

    return score


def vector_scores(
    context: RewardContext,
    retriever: CorpusRetriever,
    queries: Sequence[Group],
    documents: Sequence[Group],
) -> np.ndarray:
    """[queries, texts, documents, versions] products of their vectors, in each process."""
    strategy = context.strategy
    read = [
        [strategy.dense(group.query, [text] if text else [], context.settings.query_weight)
         for text in group.texts]
        for group in queries
    ]  # fmt: skip
    flat = [
        text.replace(SEPARATOR, retriever.separator)
        for group in read for one in group for text in one.texts
    ]  # fmt: skip
    own = retriever.encode([group.query for group in queries], "query")
    width = own.shape[1]
    present = np.array([[bool(one.texts) for one in group] for group in read])
    vectors = np.zeros((*present.shape, width), np.float32)
    if flat:
        vectors[present] = retriever.encode(flat, strategy.kind)
    weight = read[0][0].query_weight
    how = {"query_weight": weight, "normalize": retriever.normalize}
    fused = fuse_each(own, vectors, present, **how)
    found = retriever.encode([t for g in documents for t in _expanded(g)], "document")
    return np.einsum("qtw,dvw->qtdv", fused, found.reshape(len(documents), -1, width))


def word_scores(
    context: RewardContext, queries: Sequence[Group], documents: Sequence[Group]
) -> np.ndarray:
    """[queries, texts, documents, versions] scores by BM25."""
    sparse = context.strategy.sparse
    asked = [sparse(g.query, [text] if text else []) for g in queries for text in g.texts]
    texts = [text for g in documents for text in _expanded(g)]
    scores = context.words().score_texts(asked, texts)
    return scores.reshape(len(queries), -1, len(documents), len(documents[0].candidates))


def _expanded(group: Group) -> list[str]:
    """A document with each of the texts that were written for it, as it would be indexed."""
    return [f"{group.query} {text}".strip() for text in group.texts]


def _grades(data: TrainingData, queries: Sequence[Group], documents: Sequence[Group]) -> np.ndarray:
    """[queries, documents] relevance; 0 where nobody judged it."""
    qrels = data.collection.qrels["train"]
    return np.array(
        [[max(0, qrels[q.query_id].get(d.positive_id, 0)) for d in documents] for q in queries]
    )
