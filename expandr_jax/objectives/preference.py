"""Objectives of preference pairs: DPO and its kin, one for each of `PREFERENCE_LOSSES`."""

import functools
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from expandr_jax.data.preferences import read_preferences
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.files.records import read_jsonl
from expandr_jax.files.stored_rows import Picked, StoredRows
from expandr_jax.losses.language import response_sums
from expandr_jax.losses.preference import PREFERENCE_LOSSES, PreferenceLoss, preference_metrics
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.objective import Losses, Objective, ObjectiveSettings
from expandr_jax.objectives.packing import Example, tokenized

if TYPE_CHECKING:
    from expandr_jax.objectives.settings import DpoSettings


def read_pairs(
    path: str | os.PathLike,
    generator: Generator,
    settings: "DpoSettings",
    expansion: ExpansionSettings,
    threshold: float,
    *,
    own: bool,
) -> tuple[Sequence[dict[str, Any]], dict[str, int]]:
    """The pairs of a file in a format of TRL's, or of a run's preferences.jsonl: `Objective.read`.

    They say all themselves: no query is asked for, and no threshold kept. Rows are {"prompt",
    "chosen", "rejected"}; "joined" as in `packing.tokenized`.
    """
    if own:
        fields = {"prompt": str, "chosen": str, "rejected": str}
        return StoredRows((row for _, row in read_jsonl(path, fields)), "pairs"), {}

    def learned(text: str) -> list[int]:
        (ids,) = generator.token_ids([text])
        return generator.response_ids(ids, settings.response_length)[0]

    pairs, dropped = read_preferences(
        path,
        generator.tokenizer,
        learned=learned,
        prompt_length=settings.prompt_length,
        on_bad_pair=settings.on_bad_pair,
        today=generator.today,
    )
    joined = Picked(pairs, range(len(pairs)), lambda pair: {**pair, "joined": True})
    return joined, dropped


def pair_tokenizer(
    generator: Generator, rows: Sequence[Mapping[str, Any]], settings: "DpoSettings"
) -> Callable[[int, Mapping[str, Any]], tuple[list[Example], int]]:
    """Rows {"prompt", "chosen", "rejected"} to pairs, chosen first: `Objective.tokenizer`."""

    def make(number: int, row: Mapping[str, Any]) -> tuple[list[Example], int]:
        texts = row["prompt"], (row["chosen"], row["rejected"])
        joined = row.get("joined", False)
        prompt, responses, cut = tokenized(generator, *texts, settings, joined=joined)
        return [Example(prompt, responses, name=str(row.get("query_id", number)))], cut

    return make


def _pair_texts(row: Mapping[str, Any]) -> list[Any]:
    return [row["prompt"], row["chosen"], row["rejected"], row.get("joined", False)]


def preference_losses(
    log_probs: jax.Array,
    batch: Mapping[str, jax.Array],
    settings: ObjectiveSettings,
    *,
    loss: PreferenceLoss,
) -> Losses:
    """A preference loss of each pair of a packed batch: `Objective.losses`.

    The metrics are those of `preference_metrics` and both summed log-probabilities.
    """
    sums, tokens = response_sums(log_probs, batch["responses"], 2)
    scale = 1 / tokens if settings.length_normalized or loss.per_token else 1.0
    policy = sums * scale
    reference = batch["reference"] * scale if loss.reference else None
    losses = loss.losses(policy, reference, settings)
    if settings.sft_weight:
        losses = losses - settings.sft_weight * sums[:, 0] / tokens[:, 0]
    metrics = preference_metrics(policy, reference, settings.beta)
    return losses, {**metrics, "log_prob_chosen": sums[:, 0], "log_prob_rejected": sums[:, 1]}


PREFERENCE_OBJECTIVES = {
    name: Objective(
        name=name,
        rows="pairs",
        examples="preference pairs",
        file="preferences.jsonl",
        read=read_pairs,
        tokenizer=pair_tokenizer,
        responses=2,
        reference=loss.reference,
        prompt=operator.itemgetter("prompt"),
        texts=_pair_texts,
        losses=functools.partial(preference_losses, loss=loss),
    )
    for name, loss in PREFERENCE_LOSSES.items()
}
