"""Systems of one collection ranked for its test queries, each once, and what is told of them."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.metrics import CHOSEN_BY, METRICS, Judgements, RunScores
from expandr_jax.ranking.choices import Chosen, DevChoices, as_record
from expandr_jax.ranking.gate_features import GATES
from expandr_jax.ranking.ranker import Ranker
from expandr_jax.ranking.results import (
    compared,
    gate_entry,
    of_some,
    paired,
    remarks,
    summary,
)
from expandr_jax.ranking.samples import SAMPLE_METRICS, mean_by_query
from expandr_jax.ranking.systems import (
    BY_TEXTS,
    DISTILLED,
    DISTILLED_CONTROL,
    EXPANSION,
    FIGRET,
    FIGRET_CONTROL,
    OURS,
    QUERY_TOWERS,
    TURNS,
    System,
    counterparts,
    row_of_round,
)
from expandr_jax.vectors.query import EncodedQueries

SystemRows = list[dict[str, Any]]
# A leaf, and split -> its queries with their passages, to what is told of these passages.
TellSamples = Callable[[System, Mapping[str, EncodedQueries]], SystemRows]


@dataclasses.dataclass
class Evaluated:
    """What was found of systems: runs and rows in process 0 alone.

    Attributes:
        runs: System that has a row, and whatever it rests on -> its run; empty in other processes.
        choices: System -> what was chosen on dev for it.
        tried, samples, gated: Rows of evaluation/choices.jsonl, samples.jsonl and gated.jsonl.
        recalls: System -> its entry of `index_recall`.
        gates: System -> its entry of `gates`.
        answers: System -> its entry of `listwise`.
    """

    runs: dict[str, RunScores] = dataclasses.field(default_factory=dict)
    choices: dict[str, Chosen] = dataclasses.field(default_factory=dict)
    tried: SystemRows = dataclasses.field(default_factory=list)
    samples: SystemRows = dataclasses.field(default_factory=list)
    recalls: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    gated: SystemRows = dataclasses.field(default_factory=list)
    gates: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    answers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def standing(
    systems: Sequence[System], before: Collection[str], rounds: int
) -> tuple[list[str], set[str]]:
    """Names of what results say that still stands, where systems are others now.

    After further rounds the last retriever and the trained generator are not what they were.

    Args:
        systems: All that there are to be.
        before: Names of those that the results have.
        rounds: How many there are now.

    Returns:
        Those of systems that have rows, in their order, and of all that these rest on.
    """
    same = {row_of_round(round_).name for round_ in range(rounds - 1)} <= {*before}
    latest = {OURS, *QUERY_TOWERS, *TURNS}

    def stands(system: System) -> bool:
        return same or not (latest & system.retrievers or "trained" in system.generators)

    parts = {part.name: part for system in systems for part in system.with_parts()}
    rows = [system.name for system in systems if system.name in before and stands(system)]
    return rows, {name for name, part in parts.items() if stands(part)}


class Evaluation:
    """Ranks systems for the test queries of a collection, each once.

    All processes call the same methods in the same order.

    Args:
        systems: Those that have a row.
        retrievers: Names of those that encode, in the order in which they are searched by.
        rankers: "dev" and "test" -> what ranks for these queries.
        choices: What is chosen by the former.
        qrels: Judgements of the latter.
        found: What stands of results that there were before; not ranked again.
        sampled: What is told of the passages that rows of `OURS` rest on, in process 0.
        is_main: Whether this is process 0.

    Attributes:
        systems, choices, qrels, found: As the arguments, with what is found here.
    """

    def __init__(
        self,
        systems: Sequence[System],
        retrievers: Sequence[str],
        rankers: Mapping[str, Ranker],
        choices: DevChoices,
        qrels: Judgements,
        found: Evaluated,
        sampled: TellSamples,
        is_main: bool,
    ):
        self.systems, self.choices, self.qrels, self.found = systems, choices, qrels, found
        self._kept = frozenset(found.runs)
        self._rankers, self._sampled, self._is_main = rankers, sampled, is_main
        # Those of one retriever after the other, each when all that it rests on is there.
        order = [*BY_TEXTS, *retrievers]
        parts = {part.name: part for system in systems for part in system.with_parts()}
        self._order = sorted(
            parts.values(), key=lambda system: max(map(order.index, system.retrievers))
        )
        self._place = {system.name: number for number, system in enumerate(self._order)}
        left = {p.name: p for s in systems if s.name not in self._kept for p in s.with_parts()}
        # Each on dev, too, where it is a part of what is chosen there: a retriever is there once.
        weighed = [system for system in left.values() if choices.needs(system)]
        self._on_dev = {p.name for s in weighed for part in s.parts for p in part.with_parts()}
        names = (left.keys() - self._kept) | self._on_dev
        self.left = [system for system in self._order if system.name in names]

    def rank(self, system: System) -> None:
        """Ranks one of `left`, which are to be ranked in their order."""
        if system.name in self._on_dev:
            self._rankers["dev"].rank(system)
        if system.name in self._kept:
            return
        found, test = self.found, self._rankers["test"]
        found.runs[system.name] = test.rank(system)
        if recall := test.index_recall(system):
            found.recalls[system.name] = recall
        if counted := test.answers.get(system.name):
            found.answers[system.name] = {"system": system.name, **counted}
        if system.stage in GATES and self._is_main:
            rows = gated_rows(system, test, self.choices)
            found.gated = _without(system, found.gated) + rows
            found.gates[system.name] = gate_of(system, rows, found.runs, self.qrels)
        if system.retriever == OURS and system.strategy == EXPANSION:
            encoded = {split: r.encoded(system) for split, r in self._rankers.items() if r.ids}
            if self._is_main:
                found.samples = _without(system, found.samples) + self._sampled(system, encoded)

    def rows(self) -> dict[str, SystemRows]:
        """The rows of each file of evaluation/, what was kept as if it had been made now."""
        found = {
            "choices": self.choices.tried, "samples": self.found.samples, "gated": self.found.gated,
        }  # fmt: skip
        place = self._place
        return {
            name: sorted(rows, key=lambda row: place[row["system"]]) for name, rows in found.items()
        }

    def results(
        self, dataset: str, *, all_chosen: bool, hard: Collection[str] = ()
    ) -> dict[str, Any]:
        """The contents of results.json, in process 0.

        Args:
            dataset: Its name.
            all_chosen: Whether all that was chosen is told, or what its systems rest on.
            hard: Queries that are told of alone, too.
        """
        found, made = self.found, self.choices.made
        used = made if all_chosen else self._placed(made)
        values = {
            s.name: metrics.evaluate(found.runs[s.name], self.qrels, METRICS) for s in self.systems
        }
        against = [(OURS, other) for other in values if other != OURS] if OURS in values else []
        said = [
            remark for system in self.systems
            for remark in remarks(system.name, found.runs[system.name], self.qrels)
        ]  # fmt: skip
        recalls, answers, gates = (
            [*self._placed(of).values()] for of in (found.recalls, found.answers, found.gates)
        )
        results = summary(dataset, values, against, recalls, said, answers)
        tests = results["significance"]
        pair = OURS, f"{OURS}-base-generator"
        if pair in against:
            samples = self.rows()["samples"]
            for field, metric in SAMPLE_METRICS.items():
                ours, base = (mean_by_query(samples, system, "test", field) for system in pair)
                if ours:
                    tests.append(paired(*pair, metric, ours, base))
        plain = f"{OURS}-plain"
        learned = [
            (DISTILLED, plain), (DISTILLED, DISTILLED_CONTROL),
            (FIGRET, plain), (FIGRET, FIGRET_CONTROL),
        ]  # fmt: skip
        learned = [pair for pair in learned if values.keys() >= {*pair}]
        tests += compared(values, [*counterparts(self.systems), *learned])
        if hard:
            results["hardest"] = of_some(values, hard, [*against, *learned])
        results["chosen"] = {name: as_record(chosen) for name, chosen in used.items()}
        return results | ({"gates": gates} if found.gates else {})

    def _placed(self, of: Mapping[str, Any]) -> dict[str, Any]:
        """What there is of systems and what they rest on, in the order in which they are ranked."""
        return {name: of[name] for name in self._place if name in of}


def _without(system: System, rows: SystemRows) -> SystemRows:
    return [row for row in rows if row["system"] != system.name]


def gated_rows(gated: System, ranker: Ranker, choices: DevChoices) -> SystemRows:
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
