"""Rewards of groups while their texts are sampled: encoded, searched for and judged together."""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from expandr_jax.objectives.rollouts import Score
from expandr_jax.rewards.evidence import Evidence, RewardContext, evidence_of
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.registry import needs, score_groups
from expandr_jax.runtime.processes import Processes
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.encoder import Kind


def make_score(
    context: RewardContext, retriever: CorpusRetriever, kind: Kind, processes: Processes
) -> Score:
    """What rewards groups as section `reward` says; all processes call it together.

    Args:
        context: What they are judged by; without a corpus nothing is encoded.
        retriever: Encodes queries and texts.
        kind: How the latter are read.
        processes: Those of the run, of which the first one judges.
    """
    answers = needs(context.settings, "answers")

    def vectors(groups: Sequence[Group]) -> list[np.ndarray | None]:
        """Vectors of the queries, of the candidates and, where they count, of the self-answers."""
        texts = [text for group in groups for text in group.texts]
        names = [f"candidates of {group.query_id}" for group in groups for _ in group.texts]
        count = len(texts)
        if answers:
            texts += [group.answer for group in groups]
            names += [f"answer to {group.query_id}" for group in groups]
        documents = retriever.encode(texts, kind, names)
        names = [f"query {group.query_id}" for group in groups]
        own = retriever.encode([group.query for group in groups], "query", names)
        return [own, documents[:count], documents[count:] if answers else None]

    def score(groups: Sequence[Group]) -> tuple[list[Group], Mapping[str, float]]:
        begin = time.perf_counter()
        encoded = vectors(groups) if context.corpus is not None else None
        between = time.perf_counter()

        def rewards() -> list[list[tuple[float, dict[str, float]]]]:
            evidence = (
                evidence_of(context, groups, *encoded) if encoded else Evidence(context, groups)
            )
            scored = score_groups(evidence)
            return [[(c.total, dict(c.rewards)) for c in group.candidates] for group in scored]

        rows = processes.once(rewards)
        spent = between - begin, time.perf_counter() - between
        seconds = dict(zip(("encoding_seconds", "search_seconds"), spent, strict=True))
        return [*map(Group.rewarded, groups, rows)], seconds

    return score
