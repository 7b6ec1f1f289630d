"""What a run's evaluation found before systems or rounds were added to it, and what it chose."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.files.records import read_jsonl
from expandr_jax.ranking.choices import Chosen, from_record
from expandr_jax.ranking.evaluated import Evaluated, standing
from expandr_jax.ranking.gate import read_gates
from expandr_jax.ranking.gate_features import GATES
from expandr_jax.ranking.systems import System


def kept_results(
    directory: pathlib.Path,
    results: Mapping[str, Any],
    systems: Sequence[System],
    rounds: int,
    chosen: Mapping[str, Chosen],
    is_main: bool,
) -> Evaluated:
    """The results that stay valid when the systems of a run have changed.

    Args:
        directory: Where they are.
        results: The contents of results.json.
        systems, rounds: As of `standing`.
        chosen: What the results have as "chosen", from `read_chosen`.
        is_main: Whether this is process 0, which alone has runs and rows.
    """
    before = {row["system"] for row in results["rows"]}
    names, stands = standing(systems, before, rounds)

    def read(name: str) -> list[dict[str, Any]]:
        path = directory / "evaluation" / name
        if not is_main or not path.exists():
            return []
        return [row for _, row in read_jsonl(path, {"system": str}) if row["system"] in stands]

    def entries(name: str) -> dict[str, dict[str, Any]]:
        return {e["system"]: e for e in results.get(name, []) if e["system"] in stands}

    return Evaluated(
        {n: metrics.read_trec(directory / "runs" / f"{n}.trec") if is_main else {} for n in names},
        {name: choice for name, choice in chosen.items() if name in stands},
        tried=read("choices.jsonl"),
        samples=read("samples.jsonl"),
        recalls=entries("index_recall"),
        gated=read("gated.jsonl"),
        gates=entries("gates"),
        answers=entries("listwise"),
    )


def read_chosen(gates: pathlib.Path, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Chosen]:
    """What results.json has as "chosen", with all that the file of the run's gates has."""
    gated = [name for name in GATES if name in chosen]
    read = read_gates(gates, gated) if gated else {}
    return {name: read.get(name) or from_record(record) for name, record in chosen.items()}
