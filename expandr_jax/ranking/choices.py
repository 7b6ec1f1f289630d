"""What is chosen on dev: how a system uses its expansions, what parts of a fusion weigh, gates."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from expandr_jax import metrics
from expandr_jax.errors import UserError
from expandr_jax.expansion.combine import DEV, MEAN, WAYS
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.ranking.gate import Features, Gate, fit_gate
from expandr_jax.ranking.gate_features import GATES
from expandr_jax.ranking.settings import EvaluationSettings
from expandr_jax.ranking.systems import AGAIN, BY_TEXTS, System

MOST_WEIGHTS = 100  # Ways to weigh the parts of a fusion that are tried on dev, at most.


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a system uses its expansions.

    Attributes:
        query_weight: Weight of the query's own vector, if the strategy weighs it, or of its own
            search; None for BM25 where that is one search.
        samples: How many of a query's texts are used, the first ones.
        combine: How they count together, one of `expansion.combine.WAYS`.
    """

    query_weight: float | None
    samples: int
    combine: str = MEAN

    def __str__(self) -> str:
        how = "" if self.combine == MEAN else f", combined by {self.combine}"
        return f"query weight {self.query_weight}, samples {self.samples}{how}"


@dataclasses.dataclass(frozen=True)
class PartWeights:
    """What the parts of a fusion weigh, in their order; the sum is 1."""

    weights: tuple[float, ...]

    def __str__(self) -> str:
        return f"weights {', '.join(f'{weight:.4g}' for weight in self.weights)}"


@dataclasses.dataclass(frozen=True)
class Depth:
    """How many documents of a query a re-ranker reads."""

    depth: int

    def __str__(self) -> str:
        return f"depth {self.depth}"


Chosen = Choice | PartWeights | Gate | Depth


def stage_grid(system: System, settings: EvaluationSettings) -> list[Chosen]:
    """What is tried on dev of a system that has parts; nothing: it is used as it is."""
    if system.stage in AGAIN:
        return [Depth(depth) for depth in getattr(settings, system.stage).depths]
    return weight_grid(len(system.parts), steps) if (steps := settings.fusion_steps) else []


def as_record(chosen: Chosen) -> dict[str, Any]:
    """Its record in results.json and choices.jsonl, which names `combine` unless it is the mean."""
    if isinstance(chosen, Gate):  # Its file has the rest.
        return {"threshold": chosen.threshold, "share": chosen.share}
    record = dataclasses.asdict(chosen)
    if record.get("combine") == MEAN:
        del record["combine"]
    return {n: list(value) if isinstance(value, tuple) else value for n, value in record.items()}


def from_record(record: Mapping[str, Any]) -> Chosen:
    """What `as_record` wrote, of all but a gate."""
    if "depth" in record:
        return Depth(record["depth"])
    if "weights" in record:
        return PartWeights(tuple(record["weights"]))
    return Choice(**record)


def expansion_grid(settings: EvaluationSettings, combine: str, asks: int) -> list[Choice]:
    """What is tried of a strategy with so many asks, the mean first.

    `combine` is the setting of that name: a way, or `DEV`: all of them.
    """
    ways = WAYS if combine == DEV else (combine,)
    return [
        Choice(weight, samples * asks, way)
        for way in ways
        for samples in settings.samples
        for weight in settings.query_weights
    ]


def weight_grid(parts: int, steps: int) -> list[PartWeights]:
    """The weights that are tried for so many parts, the most even first.

    They are equal weights and all multiples of 1 / `steps` that add up to 1, or of a larger share
    where these were more than `MOST_WEIGHTS`. Of those that are as even the first are those that
    weigh the first parts more.
    """
    while math.comb(steps + parts - 1, parts - 1) > MOST_WEIGHTS and steps > 1:
        steps -= 1
    # Bars between stars: where each part ends.
    several = []
    for bars in itertools.combinations(range(steps + parts - 1), parts - 1):
        ends = [-1, *bars, steps + parts - 1]
        several.append([end - start - 1 for start, end in itertools.pairwise(ends)])
    several.sort(key=lambda shares: (sum(share**2 for share in shares), [-s for s in shares]))
    weights = (tuple(share / steps for share in shares) for shares in several)
    return [PartWeights(each) for each in dict.fromkeys([(1 / parts,) * parts, *weights])]


class Searcher(Protocol):
    """What choices are made by: `ranker.Ranker`, of the dev queries."""

    ids: list[str]

    def rank(self, system: System) -> metrics.RunScores: ...

    def search(self, system: System, choice: Chosen | None) -> metrics.RunScores: ...

    def encoded(self, leaf: System) -> Any: ...

    def features(self, gated: System) -> Features: ...


def choose(
    ranker: Searcher, system: System, qrels: metrics.Judgements, choices: Sequence[Chosen]
) -> list[tuple[Chosen, float]]:
    """Mean nDCG@10 of each way to use a leaf's expansions, or to weigh a fusion's parts.

    The first of equal ones is to be taken. The ranker and judgements are of the dev queries. For
    BM25 and SPLADE, which weigh no query in one search, each number of samples is tried once.
    """
    if system.retriever in BY_TEXTS:
        choices = [
            dataclasses.replace(c, query_weight=None) if c.combine == MEAN else c for c in choices
        ]
    tried = []
    for choice in dict.fromkeys(choices):
        run = ranker.search(system, choice)
        values = metrics.evaluate(run, qrels, (CHOSEN_BY,))[CHOSEN_BY]
        tried.append((choice, metrics.mean(values)))
    return tried


class DevChoices:
    """What is chosen on the dev queries of a collection, each when a system first asks for it.

    A fusion asks when its parts have been ranked, so that these have made their own choices.

    Args:
        dev: Gives the ranker of the dev queries, which asks here as well.
        qrels: Their judgements.
        grid: A system to what is tried for it; nothing: it is used as it is.
        made: System -> what was chosen before.
        tried: Rows of choices.jsonl from before.
        say: Tells what is chosen.
        keep: Keeps all rows of choices.jsonl, whenever there are more.
        is_main: Whether this is process 0, which alone decides.

    Attributes:
        made, tried: As the arguments, with what is chosen here.
    """

    def __init__(
        self,
        dev: Callable[[], Searcher],
        qrels: metrics.Judgements,
        grid: Callable[[System], Sequence[Chosen]],
        *,
        made: Mapping[str, Chosen],
        tried: Sequence[Mapping[str, Any]] = (),
        say: Callable[[str], None] = lambda text: None,
        keep: Callable[[Sequence[Mapping[str, Any]]], None] = lambda rows: None,
        is_main: bool = True,
    ):
        self.made, self.tried = dict(made), list(map(dict, tried))
        self._before = frozenset(made)  # All processes know these alone.
        self._dev, self._qrels, self._grid = dev, qrels, grid
        self._say, self._keep, self._is_main = say, keep, is_main

    def __call__(self, system: System) -> Chosen | None:
        """How a system is to be used; None: as it is, and in other processes than 0.

        All processes ask for it together.
        """
        features = None if system.name in self._before else self._prepare(system)
        if self._is_main and system.name not in self.made:
            if system.stage in GATES:
                self._fit(system, features)
            elif grid := self._grid(system):
                self._choose(system, grid)
        return self.made.get(system.name)

    def needs(self, system: System) -> bool:
        """Whether it will choose for this system by the dev runs of its parts.

        Raises:
            UserError: It has a gate, and there are no dev queries.
        """
        if not (system.is_chosen and system.parts) or system.name in self._before:
            return False
        if system.stage in GATES and not self._qrels:
            raise UserError(f"{system.name}: there are no dev queries to fit its gate on")
        return system.stage in GATES or bool(self._grid(system))

    def _prepare(self, system: System) -> Features | None:
        """What all processes have to make together before process 0 chooses; what a gate reads."""
        dev = self._dev()
        if not system.parts:
            if system.retriever not in BY_TEXTS and dev.ids:
                dev.encoded(system)
        elif system.stage in GATES or self._grid(system):
            for part in system.parts:
                dev.rank(part)
        return dev.features(system) if system.stage in GATES else None

    def _fit(self, gated: System, features: Features) -> None:
        plain, expanded = (
            metrics.evaluate(self._dev().rank(part), self._qrels, (CHOSEN_BY,))[CHOSEN_BY]
            for part in gated.parts[:2]
        )
        gate = self.made[gated.name] = fit_gate(features, plain, expanded)
        told = ", ".join(f"{name} {gate.dev[name]:.4f}" for name in ("gated", "always", "never"))
        self._say(f"{gated.name}: {gate} (dev nDCG@10, cross-fitted: {told})")

    def _choose(self, system: System, grid: Sequence[Chosen]) -> None:
        found = choose(self._dev(), system, self._qrels, grid)
        rows = [
            {"system": system.name, **as_record(choice), CHOSEN_BY: round(value, 6)}
            for choice, value in found
        ]
        self.tried += rows
        self.made |= best_of(rows)
        self._keep(self.tried)
        best = max(row[CHOSEN_BY] for row in rows)
        self._say(f"{system.name}: {self.made[system.name]} (dev nDCG@10 {best:.4f})")


def best_of(tried: Sequence[Mapping[str, Any]]) -> dict[str, Chosen]:
    """System -> the best of what was tried, of equal ones the first, by rows of choices.jsonl."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in tried:
        if row["system"] not in best or row[CHOSEN_BY] > best[row["system"]][CHOSEN_BY]:
            best[row["system"]] = row
    return {
        system: from_record({name: row[name] for name in row.keys() - {"system", CHOSEN_BY}})
        for system, row in best.items()
    }
