"""Candidates with rewards as what step B learns from, in place of pairs (dpo.loss "reward-sft")."""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from expandr_jax.data.preferences import read_candidates
from expandr_jax.expansion.expand import expansion_text
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.pairs import PairBatches
from expandr_jax.objectives.preference import DPOConfig
from expandr_jax.objectives.reward_sft import (
    RewardSftConfig,
    WeightedResponse,
    pack_weighted,
    sft_values,
)
from expandr_jax.pair import Models
from expandr_jax.rewards import ranks as rewards
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import put

LOSSES_OF_PAIRS = ("sigmoid", "hinge", "ipo", "robust")
REWARD_SFT = "reward-sft"


def is_rewarded(config: ml_collections.ConfigDict) -> bool:
    """Whether the config's `dpo` section asks for rewarded candidates."""
    return config.loss == REWARD_SFT


def rewarded_rows(
    config: ml_collections.ConfigDict, generator: Generator, path: str | os.PathLike, **limits: Any
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The lines of a file that `read_candidates` takes and from which something can be learned.

    Left out are those whose candidates are all empty, have one reward or one text, or, where the
    file has their similarities, are all below `reward.threshold`.

    Args:
        config: The whole config.
        generator: For its tokenizer.
        path: The file.
        **limits: Of `read_candidates`.

    Returns:
        The lines, and how many were left out for what reason.
    """
    rows, dropped = read_candidates(
        path, generator.tokenizer, lambda query: expansion_text(config, query), **limits
    )
    kept, dropped = [], collections.Counter(dropped)
    for row in rows:
        reason = _nothing_to_learn(row["candidates"], config.reward.threshold)
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    return kept, dict(dropped)


def _nothing_to_learn(candidates: Sequence[Mapping[str, Any]], threshold: float) -> str | None:
    """Why a query is left out, or None."""
    sides = ("similarity_positive", "similarity_answer")
    if all(side in candidate for candidate in candidates for side in sides):
        columns = [np.array([candidate[side] for candidate in candidates]) for side in sides]
        if not rewards.passes_similarity_filter(*columns, threshold):
            return "below the similarity threshold"
    usable = [candidate for candidate in candidates if candidate["text"].strip()]
    if not usable:
        return "empty"
    if len({c["text"].strip() for c in usable}) == 1 or len({c["reward"] for c in usable}) == 1:
        return "nothing preferred"
    return None


def rewarded_candidates(run: Run, models: Models, round_: int) -> list[dict[str, Any]]:
    """`rewarded_rows` of a round's candidates.jsonl."""
    path = run.path(f"round-{round_}", "candidates.jsonl")
    rows, dropped = rewarded_rows(run.config, models.generator, path)
    run.console.print(f"  {counted(len(rows), dropped, run.config.dpo)}")
    return rows


def counted(rows: int, dropped: Mapping[str, int], config: ml_collections.ConfigDict) -> str:
    """What there is to learn from, and what was left out, for people."""
    reasons = "".join(f"; {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    return f"{rows} {'queries with candidates' if is_rewarded(config) else 'pairs'}{reasons}"


def tokenize_candidates(
    generator: Generator,
    rows: Sequence[Mapping[str, Any]],
    *,
    prompt_length: int,
    response_length: int,
    temperature: float,
) -> tuple[list[WeightedResponse], int]:
    """Rewarded rows to ids: the end of the prompt, the start of each candidate, one EOS on each.

    Args:
        generator: For its tokenizer and its end of an answer.
        rows: {"prompt", "candidates": [{"text", "reward"}]}, the chat template applied.
        prompt_length: Most tokens of a prompt.
        response_length: Most tokens of a candidate, EOS included.
        temperature: Of the candidates' shares.

    Returns:
        Candidates that have a share, and how many texts had to be cut. Weights are a candidate's
        share times candidates per query, so that their mean loss is that of a query.
    """
    responses, cut = [], 0
    for number, row in enumerate(rows):
        name = str(row.get("query_id", number))
        texts = [candidate["text"] for candidate in row["candidates"]]
        shares = rewards.candidate_shares(
            np.array([candidate["reward"] for candidate in row["candidates"]]),
            np.array([bool(text.strip()) for text in texts]),
            temperature,
        )
        used = np.flatnonzero(shares)
        ids = generator.tokenizer(
            [row["prompt"], *(texts[i] for i in used)], add_special_tokens=False, verbose=False
        )["input_ids"]
        cut += len(ids[0]) > prompt_length
        prompt = ids[0][-prompt_length:]
        for place, part in zip(used, ids[1:], strict=True):
            response, was_cut = generator.response_ids(part, response_length)
            cut += was_cut
            responses.append(WeightedResponse(prompt, response, float(shares[place]), name))
    scale = len(responses) / max(1, len(rows))
    return [dataclasses.replace(r, weight=r.weight * scale) for r in responses], cut


class CandidateBatches(PairBatches):
    """Packed batches of candidates with their weights; nothing is compared with the base."""

    values = staticmethod(sft_values)
    examples = "candidates"

    def pack(
        self, pairs: Sequence[WeightedResponse], chosen: Sequence[int], reference: None
    ) -> dict[str, Any]:
        """The batch of the candidates `chosen`."""
        batch = pack_weighted([pairs[i] for i in chosen], self.models.generator.pad_id, self.shapes)
        return put(batch, self.sharding)

    def reference(self, pairs: Sequence[WeightedResponse], task: str) -> None:
        """No log-probabilities of the base are needed."""


def objective(config: ml_collections.ConfigDict) -> DPOConfig | RewardSftConfig:
    """Settings of the objective that the config's `dpo` section names."""
    if is_rewarded(config):
        return RewardSftConfig(length_normalized=config.length_normalized, chunk=config.chunk)
    return DPOConfig(
        beta=config.beta,
        kind=config.loss,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
        sft_weight=config.sft_weight,
        chunk=config.chunk,
    )
