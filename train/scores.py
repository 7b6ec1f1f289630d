"""Rewards of groups while their texts are sampled: encoded, searched for and judged in a run."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.config import Config
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.objectives.rollouts import Score
from expandr_jax.rewards.evidence import Evidence, RewardContext, evidence_of
from expandr_jax.rewards.functions import RewardFunction
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.registry import needs_vectors, score_groups
from expandr_jax.runtime.run import Run
from expandr_jax.search import Bm25Index
from expandr_jax.vectors.corpus import Corpus, CorpusRetriever


@dataclasses.dataclass(frozen=True)
class RewardTools:
    """What the rewards of a run have beside its retriever, its data and its settings.

    Attributes:
        words: Gives BM25's index of the corpus, as `run_words`.
        functions: Those of `reward.functions`, from `run_functions`.
    """

    words: Callable[[], Bm25Index]
    functions: Sequence[RewardFunction] = ()


def reward_context(
    config: Config,
    tools: RewardTools,
    data: TrainingData,
    corpus: Corpus | None,
    queries: Sequence[str],
    block: int,
    most_tokens: int,
    split: str = "train",
) -> RewardContext:
    """What candidates are judged by as a config says; the rest is as of `RewardContext`."""
    return RewardContext(
        settings=config.reward,
        seed=config.seed,
        strategy=STRATEGIES[config.expansion.strategy],
        drop_identical_ids=config.evaluation.drop_identical_ids,
        data=data,
        corpus=corpus,
        words=tools.words,
        queries=queries,
        block=block,
        most_tokens=most_tokens,
        split=split,
        functions=tools.functions,
    )


def make_score(
    run: Run,
    retriever: CorpusRetriever,
    data: TrainingData,
    queries: Sequence[str],
    tools: RewardTools,
    block: int,
    most_tokens: int,
    split: str = "train",
) -> Score:
    """What rewards groups by the config's section `reward`; all processes call it together.

    `queries` are the ids of all that there can be groups of; the rest is as of `RewardContext`.
    """
    looks = needs_vectors(run.config.reward)
    corpus = retriever.corpus if looks else None
    context = reward_context(run.config, tools, data, corpus, queries, block, most_tokens, split)

    def vectors(groups: Sequence[Group]) -> list[np.ndarray | None]:
        """Vectors of the queries, of the candidates and, where they count, of the self-answers."""
        texts = [text for group in groups for text in group.texts]
        names = [f"candidates of {group.query_id}" for group in groups for _ in group.texts]
        if run.config.reward.answer > 0:
            texts += [group.answer for group in groups]
            names += [f"answer to {group.query_id}" for group in groups]
        kind = run.config.expansion.kind
        documents = retriever.encode(texts, kind, names)
        names = [f"query {group.query_id}" for group in groups]
        own = retriever.encode([group.query for group in groups], "query", names)
        count = sum(len(group.texts) for group in groups)
        answers = documents[count:] if run.config.reward.answer > 0 else None
        return [own, documents[:count], answers]

    def score(groups: Sequence[Group]) -> tuple[list[Group], Mapping[str, float]]:
        begin = time.perf_counter()
        encoded = vectors(groups) if looks else None
        between = time.perf_counter()

        def rewards() -> list[list[tuple[float, dict[str, float]]]]:
            evidence = (
                evidence_of(context, groups, *encoded) if looks else Evidence(context, groups)
            )
            scored = score_groups(evidence)
            return [[(c.total, dict(c.rewards)) for c in group.candidates] for group in scored]

        rows = run.processes.once(rewards)
        spent = between - begin, time.perf_counter() - between
        seconds = dict(zip(("encoding_seconds", "search_seconds"), spent, strict=True))
        return [*map(_rewarded, groups, rows)], seconds

    return score


def _rewarded(group: Group, rewards: Sequence[Any]) -> Group:
    candidates = [
        dataclasses.replace(candidate, total=total, rewards=terms)
        for candidate, (total, terms) in zip(group.candidates, rewards, strict=True)
    ]
    return dataclasses.replace(group, candidates=candidates)
