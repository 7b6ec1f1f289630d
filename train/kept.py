"""What a run's evaluation found before systems or rounds were added to it, and what it chose."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.files.records import read_jsonl
from expandr_jax.metrics import RunScores
from expandr_jax.ranking.choices import Chosen, from_record
from expandr_jax.ranking.gate import read_gates
from expandr_jax.ranking.gate_features import GATES
from expandr_jax.ranking.systems import OURS, QUERY_TOWERS, TURNS, System, row_of_round
from expandr_jax.runtime.run import Run


@dataclasses.dataclass(frozen=True)
class Kept:
    """Results of systems that need not be ranked again.

    Attributes:
        runs: System that has a row -> its run; empty in other processes than 0.
        choices: System -> what was chosen on dev for it.
        tried, samples, gated: Rows of evaluation/choices.jsonl, samples.jsonl and gated.jsonl, in
            process 0.
        recalls: System -> its entry of `index_recall`.
        gates: System -> its entry of `gates`.
        answers: System -> its entry of `listwise`.
    """

    runs: dict[str, RunScores] = dataclasses.field(default_factory=dict)
    choices: dict[str, Chosen] = dataclasses.field(default_factory=dict)
    tried: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    recalls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    gated: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    gates: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def kept_results(
    run: Run, folder: str, results: Mapping[str, Any], systems: Sequence[System]
) -> Kept:
    """The results that stay valid when the systems of a run have changed.

    After further rounds the last retriever and the trained generator are not what they were.

    Args:
        run, folder: As of `evaluate`.
        results: The contents of results.json.
        systems: All that there are to be.
    """
    rows = {row["system"] for row in results["rows"]}
    rounds = {row_of_round(r).name for r in range(run.config.rounds - 1)}
    same = rounds <= rows
    parts = {part.name: part for system in systems for part in system.with_parts()}

    def stands(system: System) -> bool:
        latest = {OURS, *QUERY_TOWERS, *TURNS}
        return same or not (latest & system.retrievers or "trained" in system.generators)

    directory, main = run.path(folder), run.processes.is_main
    names = [system.name for system in systems if system.name in rows and stands(system)]
    standing = {name for name, part in parts.items() if stands(part)}

    def read(name: str) -> list[dict[str, Any]]:
        path = directory / "evaluation" / name
        if not main or not path.exists():
            return []
        return [row for _, row in read_jsonl(path, {"system": str}) if row["system"] in standing]

    return Kept(
        {n: metrics.read_trec(directory / "runs" / f"{n}.trec") if main else {} for n in names},
        {n: c for n, c in read_chosen(run, results["chosen"]).items() if n in standing},
        read("choices.jsonl"),
        read("samples.jsonl"),
        {e["system"]: e for e in results.get("index_recall", []) if e["system"] in standing},
        read("gated.jsonl"),
        {e["system"]: e for e in results.get("gates", []) if e["system"] in standing},
        {e["system"]: e for e in results.get("listwise", []) if e["system"] in standing},
    )


def read_chosen(run: Run, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Chosen]:
    """What results.json has as "chosen", with all that the file of the run's gates has."""
    gated = [name for name in GATES if name in chosen]
    gates = read_gates(run.path("evaluation", "gates.json"), gated) if gated else {}
    return {name: gates.get(name) or from_record(record) for name, record in chosen.items()}
