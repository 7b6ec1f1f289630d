"""What a run writes about its gated systems."""

from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.metrics import CHOSEN_BY, Judgements, RunScores
from expandr_jax.ranking.choices import DevChoices
from expandr_jax.ranking.ranker import Ranker
from expandr_jax.ranking.results import gate_entry
from expandr_jax.ranking.systems import System


def gated_rows(gated: System, ranker: Ranker, choices: DevChoices) -> list[dict[str, Any]]:
    """Rows of evaluation/gated.jsonl: what the gate said of each query that was just ranked."""
    threshold = choices.made[gated.name].threshold
    return [
        {
            "system": gated.name,
            "query_id": query,
            "probability": round(chance, 6),
            "expanded": chance >= threshold,
        }
        for query, chance in ranker.chances[gated.name].items()
    ]


def gate_of(
    gated: System,
    rows: Sequence[Mapping[str, Any]],
    runs: Mapping[str, RunScores],
    qrels: Judgements,
) -> dict[str, Any]:
    """A system's entry of "gates" in results.json, by its `gated_rows` and runs of its parts."""
    plain, expanded, _ = gated.parts
    values = [
        metrics.evaluate(runs[system.name], qrels, (CHOSEN_BY,))[CHOSEN_BY]
        for system in (gated, expanded, plain)
    ]
    return gate_entry(gated.name, {row["query_id"]: row["expanded"] for row in rows}, *values)
