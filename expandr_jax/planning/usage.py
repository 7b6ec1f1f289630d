"""Tables of what a rehearsal measured of each stage, and whether it fits at the full counts."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from expandr_jax.planning.growth import fit_growth
from expandr_jax.report.tables import Bold, render
from expandr_jax.runtime.chips import GIB


@dataclasses.dataclass(frozen=True)
class Measure:
    """What is measured of a stage.

    Attributes:
        name: In the table.
        unit: What a value is divided by there, and what that is called.
        by_chance: By how much values differ when the same is done again.
        share: The same as a share of the value.
    """

    name: str
    unit: tuple[float, str]
    by_chance: float
    share: float = 0.02


MEASURES = {
    # What compiling a program takes that another scale has compiled before.
    "memory_bytes": Measure("memory of a process", (GIB, "GiB"), 128 * 2**20),
    "device_bytes": Measure("largest buffer on a device", (GIB, "GiB"), 2**20),
    "disk_bytes": Measure("disk", (GIB, "GiB"), 2**20),
    # A length or a size more or less of the few that there may be.
    "programs": Measure("programs compiled", (1, ""), 8),
    "seconds": Measure("seconds outside them", (1, "s"), 3, 0.25),
}


def usage_rows(
    scales: Sequence[float],
    usage: Sequence[Sequence[Mapping[str, Mapping[str, float]]]],
    limits: Mapping[str, float | None],
) -> list[dict[str, Any]]:
    """A row for each stage and measure, as `train.rehearse` writes them.

    Args:
        scales: Shares of the full counts.
        usage: [scales][processes][stage][measure]; the most of all processes counts.
        limits: Measure -> the most that there may be at the full counts; None: any.
    """
    stages = dict.fromkeys(stage for run in usage for one in run for stage in one)
    rows = []
    for stage in stages:
        for name, measure in MEASURES.items():
            values = [max(one.get(stage, {}).get(name, 0) for one in run) for run in usage]
            growth = fit_growth(scales, values, measure.by_chance, measure.share)
            limit = limits.get(name)
            rows.append(
                {
                    "stage": stage,
                    "measure": name,
                    "values": values,
                    "growth": growth.kind,
                    "at_full_scale": growth.at_full_scale,
                    "error": growth.error,
                    "limit": limit,
                    "fits": growth.kind != "worse"
                    and (limit is None or growth.at_full_scale <= limit),
                }
            )
    return rows


def show_usage(
    scales: Sequence[float], rows: Sequence[Mapping[str, Any]], console: Console
) -> None:
    """Prints a table of each measure."""
    for name, measure in MEASURES.items():
        divisor, unit = measure.unit
        header = ["stage", *(f"{s:g}" for s in scales), "grows", "at 1", "error of it", "fits"]

        def cell(value: float, divisor: float = divisor) -> str:
            return f"{value / divisor:.3g}"

        cells = [
            [
                row["stage"],
                *map(cell, row["values"]),
                row["growth"],
                cell(row["at_full_scale"]),
                cell(row["error"]),
                "yes" if row["fits"] else Bold("NO"),
            ]
            for row in rows
            if row["measure"] == name and any(row["values"])
        ]
        limit = next((row["limit"] for row in rows if row["measure"] == name), None)
        of = "" if limit is None else f" of {cell(limit)}"
        title = f"{measure.name}{f', {unit}' if unit else ''}{of}"
        console.print(render(title, header, cells))


def usage_misfits(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What does not fit, a line for each stage and measure."""
    lines = []
    for row in rows:
        if row["fits"]:
            continue
        measure = MEASURES[row["measure"]]
        divisor, unit = measure.unit
        value = f"{row['at_full_scale'] / divisor:.3g} {unit}".strip()
        why = f"{value} at the full counts"
        if row["growth"] == "worse":
            why = f"grows worse than linearly, to {value}"
        if row["limit"] is not None:
            why += f", of {row['limit'] / divisor:.3g}"
        lines.append(f"{row['stage']}: {measure.name}: {why}")
    return lines
