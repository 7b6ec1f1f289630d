"""Differences between systems, query by query, and tests of their significance."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

from expandr_jax import metrics
from expandr_jax.files.records import read_jsonl
from expandr_jax.ranking.results import QueryMetrics

TESTS = (metrics.paired_test, metrics.randomisation_test)
DIFFERENCES_HEADER = (
    "measure", "run", "mean", "difference", "win", "tie", "loss",
    "t-test p", "t-test p, Holm", "randomisation p", "randomisation p, Holm",
)  # fmt: skip
MOVED_HEADER = ("run", "query", "baseline", "value", "difference", "text", "expansions")


@dataclasses.dataclass(frozen=True)
class RunComparison:
    """One run under one measure; what follows `mean` is None for the baseline.

    On `win`, `tie` and `loss` queries the run is better than the baseline, the same and worse.
    P-values are those of `TESTS`, and adjusted for all comparisons made by Holm's method.
    """

    measure: str
    run: str
    mean: float
    difference: float | None = None
    win: int | None = None
    tie: int | None = None
    loss: int | None = None
    p_values: tuple[float, ...] | None = None
    adjusted: tuple[float, ...] | None = None

    def cells(self) -> list[str]:
        """The row of the table."""
        head = [self.measure, self.run, f"{self.mean:.4f}"]
        if self.difference is None:
            return head + [""] * (len(DIFFERENCES_HEADER) - len(head))
        counts = [str(count) for count in (self.win, self.tie, self.loss)]
        pairs = zip(self.p_values, self.adjusted, strict=True)
        return [*head, f"{self.difference:+.4f}", *counts, *(f"{p:.4g}" for q in pairs for p in q)]


def compare(values: QueryMetrics, baseline: str) -> list[RunComparison]:
    """Every run under every measure, measure by measure, the baseline first."""
    rows = []
    order = [baseline, *(run for run in values if run != baseline)]
    for measure, reference in values[baseline].items():
        for run in order:
            mine, differing = values[run][measure], {}
            if run != baseline:
                differences = [mine[query] - value for query, value in reference.items()]
                tests = [test(mine, reference) for test in TESTS]
                differing = {
                    "difference": tests[0]["difference"],
                    "win": sum(d > 0 for d in differences),
                    "tie": sum(d == 0 for d in differences),
                    "loss": sum(d < 0 for d in differences),
                    "p_values": tuple(test["p_value"] for test in tests),
                }
            rows.append(RunComparison(measure, run, metrics.mean(mine), **differing))
    compared = [row for row in rows if row.p_values is not None]
    by_test = zip(*(row.p_values for row in compared), strict=True)
    adjusted = iter(list(zip(*map(metrics.holm, by_test), strict=True)))
    return [row if row.p_values is None else
            dataclasses.replace(row, adjusted=next(adjusted)) for row in rows]  # fmt: skip


def moved(
    values: QueryMetrics,
    baseline: str,
    count: int,
    texts: Mapping[str, str],
    expansions: Mapping[tuple[str, str], Sequence[str]],
) -> list[list[str]]:
    """Rows of `MOVED_HEADER`: the queries that changed most under the first measure, run by run.

    There are `count` of a run at most, and none that did not change. Texts are queries' by their
    ids, expansions by run and query id.
    """
    measure, reference = next(iter(values[baseline].items()))
    rows = []
    for run in values:
        mine = values[run][measure]
        changed = [query for query in reference if mine[query] != reference[query]]
        changed.sort(key=lambda query: -abs(mine[query] - reference[query]))
        rows += [
            [
                run,
                query,
                f"{reference[query]:.4f}",
                f"{mine[query]:.4f}",
                f"{mine[query] - reference[query]:+.4f}",
                texts.get(query, ""),
                " | ".join(" ".join(text.split()) for text in expansions.get((run, query), ())),
            ]
            for query in changed[:count]
        ]
    return rows


def read_expansions(
    path: pathlib.Path,
) -> tuple[dict[str, str], dict[tuple[str, str], list[str]]]:
    """Texts of queries, and expansions by (system, query id), of an expansions.jsonl."""
    fields = {"query_id": str, "system": str, "query": str, "expansion": str}
    texts: dict[str, str] = {}
    expansions: dict[tuple[str, str], list[str]] = {}
    for _, row in read_jsonl(path, fields):
        texts[row["query_id"]] = row["query"]
        expansions.setdefault((row["system"], row["query_id"]), []).append(row["expansion"])
    return texts, expansions
