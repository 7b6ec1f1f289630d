"""Collections x systems, over seeds: means and intervals, tests against rows without expansions.

A query has one value for each training (seed). Intervals and tests are over queries, each with its
mean over the seeds: seeds are no new queries. How much trainings differ is told beside them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.ranking.baselines import baselines
from expandr_jax.ranking.results import QueryMetrics
from expandr_jax.report.differences import compare

DIGITS = 6  # As in results.json.
COSTS = ("tokens_per_query", "seconds_per_query")
TRAINING_FIELDS = ("training_seconds", "seconds", "peak_memory_bytes", "revision", "device")
_ENOUGH = 9  # Digits by which means over seeds are the same, in whatever order they are added.


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a table knows of a collection.

    Attributes:
        name: Its name.
        seeds: The trainings' seeds, in the order of the values.
        queries: Ids of the test queries, likewise.
        values: System -> metric -> [seeds, queries].
        costs: For each seed, system -> what `COSTS` names.
        trainings: What each seed's run took and was made with, as `TRAINING_FIELDS` names it.
        texts: The queries.
        writers: System -> whose passages its queries are expanded with, as of `System.writer`.
        writer: Who wrote the `expansions`.
        expansions: Query -> a passage, of the first seed.
    """

    name: str
    seeds: Sequence[int]
    queries: Sequence[str]
    values: Mapping[str, Mapping[str, np.ndarray]]
    costs: Sequence[Mapping[str, Mapping[str, float]]] = ()
    trainings: Sequence[Mapping[str, Any]] = ()
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    writers: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    writer: str = ""
    expansions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def over_seeds(self) -> QueryMetrics:
        """System -> metric -> query -> mean over the seeds."""
        return {
            system: {
                metric: dict(
                    zip(self.queries, values.mean(axis=0).round(_ENOUGH).tolist(), strict=True)
                )
                for metric, values in of.items()
            }
            for system, of in self.values.items()
        }


def grid_rows(collections: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row for each collection, system and metric.

    Returns:
        {"collection", "system", "metric", "mean", "low", "high", "deviation", "seeds"}: 95 %
        bootstrap interval over queries; standard deviation over seeds, None of a single one; the
        mean of each seed.
    """
    rows = []
    for one in collections:
        means = one.over_seeds
        for system, of in one.values.items():
            for metric, values in of.items():
                each = values.mean(axis=1)
                low, high = metrics.bootstrap_interval([*means[system][metric].values()])
                deviation = round(float(each.std(ddof=1)), DIGITS) if len(each) > 1 else None
                rows.append({
                    "collection": one.name, "system": system, "metric": metric,
                    "mean": round(float(values.mean()), DIGITS),
                    "low": round(low, DIGITS), "high": round(high, DIGITS),
                    "deviation": deviation, "seeds": each.round(DIGITS).tolist(),
                })  # fmt: skip
    return rows


def comparisons_of(collections: Sequence[Measured]) -> list[dict[str, Any]]:
    """Each system against each of its `baselines`, in `CHOSEN_BY`, by paired tests over queries.

    Returns:
        {"collection", "system", "baseline", "metric", "difference", "ratio", "helped", "hurt",
        "p_value", "p_value_holm", "randomisation_p_value", "randomisation_p_value_holm"}: "ratio"
        is of the means, None where the baseline's is 0; shares of queries above and below it;
        two-sided, t-test and randomisation; Holm's method adjusts them over the collections.
    """
    rows = [row for one in collections for row in _tests(one)]
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        families.setdefault((row["system"], row["baseline"]), []).append(row)
    for family in families.values():
        for name in ("p_value", "randomisation_p_value"):
            adjusted = metrics.holm([row[name] for row in family])
            for row, value in zip(family, adjusted, strict=True):
                row[f"{name}_holm"] = value
    return rows


def _tests(one: Measured) -> list[dict[str, Any]]:
    means = {system: {CHOSEN_BY: of[CHOSEN_BY]} for system, of in one.over_seeds.items()}
    pairs = [(system, baseline) for system in means for baseline in baselines(system, means)]
    found = {}
    for baseline in dict.fromkeys(baseline for _, baseline in pairs):
        compared = {name: means[name] for name, against in pairs if against == baseline}
        below, *rows = compare({baseline: means[baseline], **compared}, baseline)
        for row in rows:
            found[row.run, baseline] = {
                "collection": one.name, "system": row.run, "baseline": baseline,
                "metric": row.measure, "difference": round(row.difference, DIGITS),
                "ratio": round(row.mean / below.mean, DIGITS) if below.mean else None,
                "helped": round(row.win / len(one.queries), DIGITS),
                "hurt": round(row.loss / len(one.queries), DIGITS),
                "p_value": row.p_values[0], "randomisation_p_value": row.p_values[1],
            }  # fmt: skip
    return [found[pair] for pair in pairs]


def costs_of(collections: Sequence[Measured]) -> list[dict[str, Any]]:
    """{"collection", "system", "tokens_per_query", "seconds_per_query"}, means over the seeds.

    None where a run has not recorded it.
    """
    return [
        {"collection": one.name, "system": system,
         **{name: _mean([costs[system][name] for costs in one.costs if system in costs])
            for name in COSTS}}
        for one in collections
        for system in one.values
    ]  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    if not values or any(value is None for value in values):
        return None
    return round(float(np.mean(values)), DIGITS)


def trainings_of(collections: Sequence[Measured]) -> list[dict[str, Any]]:
    """{"collection", "seed", ...} with what `TRAINING_FIELDS` names, of each cell."""
    return [
        {"collection": one.name, "seed": seed, **{name: training[name] for name in TRAINING_FIELDS}}
        for one in collections
        for seed, training in zip(one.seeds, one.trainings, strict=True)
    ]


def moved_most(one: Measured, system: str, baseline: str, count: int) -> list[str]:
    """The queries that gained most over a baseline, the most first, then those that lost most."""
    ours, theirs = (one.over_seeds[name][CHOSEN_BY] for name in (system, baseline))
    change = {query: ours[query] - theirs[query] for query in ours}
    gained = sorted((q for q in change if change[q] > 0), key=lambda q: -change[q])[:count]
    lost = sorted((q for q in change if change[q] < 0), key=lambda q: change[q])[:count]
    return gained + lost
