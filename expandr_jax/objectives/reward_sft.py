"""The objective that learns all of a query's candidates, each by its reward's share.

loss of a query = - sum_i w_i log pi(d_i | q), with w of `candidate_shares`: the M step of
expectation maximisation over expansions. It needs neither a reference model nor a rejected text.
"""

import collections
import dataclasses
import operator
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.data.preferences import read_candidates
from expandr_jax.expansion.expand import expansion_text
from expandr_jax.losses.language import response_sums
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.objective import Losses, Objective, ObjectiveSettings
from expandr_jax.objectives.packing import Example
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.selection import candidate_shares, nothing_to_learn


def read_rewarded(
    path: str | os.PathLike, generator: Generator, config: Any, own: bool
) -> tuple[list[Group], dict[str, int]]:
    """The groups of a file that `read_candidates` takes, from which something can be learned.

    Left out are those whose candidates are all empty, have one reward or one text, or, where the
    file has their similarities, are all below `reward.threshold`.

    Args:
        path: The file.
        generator: For its tokenizer.
        config: The whole config.
        own: The file is a run's candidates.jsonl.

    Returns:
        The groups, and how many were left out for what reason.
    """
    limits = {"prompt_length": config.dpo.prompt_length, "on_bad_pair": config.dpo.on_bad_pair}
    rows, dropped = read_candidates(
        path,
        generator.tokenizer,
        lambda query: expansion_text(config, query),
        **({} if own else limits),
    )
    kept, dropped = [], collections.Counter(dropped)
    for group in map(Group.from_row, rows):
        reason = nothing_to_learn(group, config.reward.threshold)
        if reason is None:
            kept.append(group)
        else:
            dropped[reason] += 1
    return kept, dict(dropped)


def tokenize_candidates(
    generator: Generator,
    groups: Sequence[Group],
    settings: ObjectiveSettings,
    *,
    prompt_length: int,
    response_length: int,
) -> tuple[list[Example], int]:
    """Rewarded groups to ids: the end of the prompt, the start of each candidate, one EOS on each.

    Args:
        generator: For its tokenizer and its end of an answer.
        groups: With their prompts.
        settings: Have the temperature of the candidates' shares.
        prompt_length: Most tokens of a prompt.
        response_length: Most tokens of a candidate, EOS included.

    Returns:
        An example for each candidate that has a share, and how many texts had to be cut. "weight"
        is a candidate's share times candidates per query, so that the mean loss of candidates is
        that of queries.
    """
    examples, cut = [], 0
    for number, group in enumerate(groups):
        name, texts = str(number if group.query_id == "" else group.query_id), group.texts
        shares = candidate_shares(
            np.array([candidate.total for candidate in group.candidates]),
            np.array([bool(text.strip()) for text in texts]),
            settings.reward_temperature,
        )
        used = np.flatnonzero(shares)
        ids = generator.tokenizer(
            [group.prompt, *(texts[i] for i in used)], add_special_tokens=False, verbose=False
        )["input_ids"]
        cut += len(ids[0]) > prompt_length
        prompt = ids[0][-prompt_length:]
        for candidate, part in zip(used, ids[1:], strict=True):
            response, was_cut = generator.response_ids(part, response_length)
            cut += was_cut
            share = float(shares[candidate])
            examples.append(Example(prompt, (response,), {"weight": share}, name))
    scale = len(examples) / max(1, len(groups))
    return [
        dataclasses.replace(e, extras={"weight": e.extras["weight"] * scale}) for e in examples
    ], cut


def weighted_losses(
    log_probs: jax.Array, batch: Mapping[str, jax.Array], settings: ObjectiveSettings
) -> Losses:
    """Weighted negative log-likelihood of each response of a batch.

    Args:
        log_probs: [batch, response tokens] under the policy.
        batch: From `pack` of examples with one response and a "weight" each.
        settings: What the loss is set to.

    Returns:
        [batch] losses, and {"log_prob", "token_log_prob"}, [batch] each: the response's summed and
        mean log-probability, without its weight.
    """
    sums, tokens = response_sums(log_probs, batch["responses"], 1)
    log_prob, mean = sums[:, 0], sums[:, 0] / tokens[:, 0]
    losses = -batch["weight"] * (mean if settings.length_normalized else log_prob)
    return losses, {"log_prob": log_prob, "token_log_prob": mean}


REWARD_SFT = Objective(
    phase="reward-sft",
    rows="queries with candidates",
    examples="candidates",
    file="candidates.jsonl",
    read=read_rewarded,
    tokenize=tokenize_candidates,
    responses=1,
    reference=False,
    prompt=operator.attrgetter("prompt"),
    losses=weighted_losses,
    extras=("weight",),
)
