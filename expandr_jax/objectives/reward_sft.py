"""The objective that learns all of a query's candidates, each by its reward's share.

loss of a query = - sum_i w_i log pi(d_i | q), with w of `candidate_shares`: the M step of
expectation maximisation over expansions. It needs neither a reference model nor a rejected text.
"""

import collections
import operator
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.data.preferences import read_candidates
from expandr_jax.expansion.expand import expansion_text
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.files.stored_rows import Picked
from expandr_jax.losses.language import response_sums
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.objective import Losses, Objective, ObjectiveSettings
from expandr_jax.objectives.packing import Example, tokenized
from expandr_jax.objectives.settings import DpoSettings
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.selection import candidate_shares, nothing_to_learn


def read_groups(
    path: str | os.PathLike,
    generator: Generator,
    settings: DpoSettings,
    expansion: ExpansionSettings,
    *,
    own: bool,
) -> tuple[Sequence[Group], dict[str, int]]:
    """The groups of a file that `read_candidates` takes, and how many were left out, and why."""
    limits = {"prompt_length": settings.prompt_length, "on_bad_pair": settings.on_bad_pair}
    rows, dropped = read_candidates(
        path,
        generator.tokenizer,
        lambda query: generator.chat_text(expansion_text(expansion, query)),
        today=generator.today,
        **({} if own else limits),
    )
    return Picked(rows, range(len(rows)), Group.from_row), dropped


def read_rewarded(
    path: str | os.PathLike,
    generator: Generator,
    settings: DpoSettings,
    expansion: ExpansionSettings,
    threshold: float,
    *,
    own: bool,
) -> tuple[Sequence[Group], dict[str, int]]:
    """The groups of `read_groups` that something is to be learned of: `Objective.read`.

    Left out are those whose candidates are all empty, have one reward or one text, or, where the
    file has their similarities, are all below the threshold.
    """
    groups, left_out = read_groups(path, generator, settings, expansion, own=own)
    kept, dropped = array("q"), collections.Counter(left_out)
    for number, group in enumerate(groups):
        reason = nothing_to_learn(group, threshold)
        if reason is None:
            kept.append(number)
        else:
            dropped[reason] += 1
    return Picked(groups, kept), dict(dropped)


def candidate_tokenizer(
    generator: Generator, groups: Sequence[Group], settings: DpoSettings
) -> Callable[[int, Group], tuple[list[Example], int]]:
    """An example for each candidate of a group that has a share: `Objective.tokenizer`.

    "weight" is a candidate's share times candidates per query, so that the mean loss of candidates
    is that of queries.
    """
    scale = sum(_count(group, settings) for group in groups) / max(1, len(groups))

    def make(number: int, group: Group) -> tuple[list[Example], int]:
        name, texts = str(number if group.query_id == "" else group.query_id), group.texts
        shares = _shares(group, settings)
        used = np.flatnonzero(shares)
        prompt, responses, cut = tokenized(
            generator, group.prompt, [texts[i] for i in used], settings
        )
        examples = [
            Example(prompt, (response,), {"weight": float(shares[i]) * scale}, name)
            for i, response in zip(used, responses, strict=True)
        ]
        return examples, cut

    return make


def _shares(group: Group, settings: DpoSettings) -> np.ndarray:
    return candidate_shares(
        np.array([candidate.total for candidate in group.candidates]),
        np.array([bool(text.strip()) for text in group.texts]),
        settings.reward_temperature,
    )


def _count(group: Group, settings: DpoSettings) -> int:
    return int(np.count_nonzero(_shares(group, settings)))


def _group_texts(group: Group) -> list[Any]:
    return [group.prompt, [[c.text, float(c.total)] for c in group.candidates]]


def weighted_losses(
    log_probs: jax.Array, batch: Mapping[str, jax.Array], settings: ObjectiveSettings
) -> Losses:
    """Weighted negative log-likelihood of each response of a batch: `Objective.losses`.

    The metrics "log_prob" and "token_log_prob" are the response's summed and mean log-probability,
    without its weight.
    """
    sums, tokens = response_sums(log_probs, batch["responses"], 1)
    log_prob, mean = sums[:, 0], sums[:, 0] / tokens[:, 0]
    losses = -batch["weight"] * (mean if settings.length_normalized else log_prob)
    return losses, {"log_prob": log_prob, "token_log_prob": mean}


REWARD_SFT = Objective(
    name="reward-sft",
    rows="queries with candidates",
    examples="candidates",
    file="candidates.jsonl",
    read=read_rewarded,
    tokenizer=candidate_tokenizer,
    responses=1,
    reference=False,
    prompt=operator.attrgetter("prompt"),
    texts=_group_texts,
    count=_count,
    losses=weighted_losses,
    extras=("weight",),
)
