"""Texts of a strategy with what they took: how many tokens, and how sure the generator was."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.expansion.expand import Expander, Sample
from expandr_jax.expansion.sampled import MadeWhenAsked, SampledTexts
from expandr_jax.expansion.strategies import Ask
from expandr_jax.generation.requests import Requests


def texts_with_counts(
    expander: Expander, queries: Mapping[str, str], samples: int, sample: Sample
) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any] | None]:
    """What `Expander.texts` makes, how many tokens each text took, and their mean log-probability.

    What an `Ask` wrote whose texts are not used counts to the first text of the one after it.

    Args:
        expander, queries, samples, sample: As of `Expander.texts`; rows of what `sample` gives have
            "tokens" and, where they are kept, "log_probs".

    Returns:
        Query id -> each of these [asks][samples]. The last is None where texts lack it: a server's
        do, and those that are older than the gate.
    """
    used: list[SampledTexts] = []
    before: list[list[SampledTexts]] = [[]]  # Before each that is used, and the next.

    def kept(step: Ask, requests: Requests) -> SampledTexts:
        made = sample(step, requests)
        if step.used:
            used.append(made)
            before.append([])
        else:
            before[-1].append(made)
        return made

    def counts(texts: SampledTexts, helpers: Sequence[SampledTexts], query: str) -> list[int]:
        first, *rest = (texts.row((query, number))["tokens"] for number in range(samples))
        return [first + sum(of.row((query, 0))["tokens"] for of in helpers), *rest]

    def tokens(query: str) -> list[list[int]]:
        return [counts(*of, query) for of in zip(used, before, strict=False)]

    def log_probs(query: str) -> list[list[float]]:
        rows = [[texts.row((query, number)) for number in range(samples)] for texts in used]
        return [[float(np.mean(row["log_probs"] or [0.0])) for row in of] for of in rows]

    made = expander.texts(queries, samples, kept), MadeWhenAsked(queries, tokens)
    whole = all("log_probs" in row for texts in used for row in texts.rows)
    return *made, MadeWhenAsked(queries, log_probs) if whole else None
