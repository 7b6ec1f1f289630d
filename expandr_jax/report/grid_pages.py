"""The table over collections and seeds as results.json, .md, .tex, .csv and .html."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.table import Table

from expandr_jax.files.records import write_json, write_text
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.ranking.baselines import baselines
from expandr_jax.ranking.systems import OURS
from expandr_jax.report import page
from expandr_jax.report.grid import (
    Measured,
    comparisons_of,
    costs_of,
    grid_rows,
    moved_most,
    trainings_of,
)
from expandr_jax.report.page import parts
from expandr_jax.report.run_report import results_section
from expandr_jax.report.tables import Bold, render

MOVED = 6  # Queries that are shown as those that gained most, and that lost most.
LEVEL = 0.05  # p-values below it stand out.
_NONE = "–"  # What nobody knows.
GridRows = Sequence[Mapping[str, Any]]
Drawn = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # Title, header and cells of a table.


def write_grid(
    directory: pathlib.Path, collections: Sequence[Measured], missing: Sequence[str]
) -> Table:
    """Writes results.json, .md, .tex, .csv and .html; returns the table for the terminal.

    `missing` names cells that belong to the table and are not there.
    """
    rows, tests = grid_rows(collections), comparisons_of(collections)
    costs, trainings = costs_of(collections), trainings_of(collections)
    contents = {"rows": rows, "tests": tests, "costs": costs, "cells": trainings,
                "missing": list(missing)}  # fmt: skip
    write_json(directory / "results.json", contents)
    tables = [
        _means(collections, rows, missing), _tests(tests), _costs(costs), _trainings(trainings)
    ]  # fmt: skip
    for form, suffix in (("markdown", ".md"), ("latex", ".tex")):
        texts = [render(*drawn, form) for drawn in tables if drawn[2]]
        write_text(directory / f"results{suffix}", "\n".join(texts))
    write_text(directory / "results.csv", render("", *_long(collections, rows), "csv"))
    write_text(directory / "results.html", _page(collections, contents, tables))
    return render(*tables[0])


def _means(collections: Sequence[Measured], rows: GridRows, missing: Sequence[str]) -> Drawn:
    """Systems x collections: means with intervals, and deviations over seeds."""
    found = {(r["collection"], r["system"]): r for r in rows if r["metric"] == CHOSEN_BY}
    names = [one.name for one in collections]
    systems = list(dict.fromkeys(system for _, system in found))
    best = {name: max(r["mean"] for (c, _), r in found.items() if c == name) for name in names}

    def cell(name: str, system: str) -> str:
        if (row := found.get((name, system))) is None:
            return _NONE
        text = f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        if row["deviation"] is not None:
            text += f" ({row['deviation']:.4f})"
        return Bold(text) if row["mean"] == best[name] else text

    seeds = "; ".join(
        f"{one.name}: {len(one.queries):,} queries, seeds {', '.join(map(str, one.seeds))}"
        for one in collections
    )
    title = (
        f"{CHOSEN_BY}: mean over seeds [95 % interval over queries] (deviation over seeds). {seeds}"
    )
    if missing:
        title += f". Missing: {'; '.join(missing)}"
    cells = [[system, *(cell(name, system) for name in names)] for system in systems]
    return title, ["system", *names], cells


def _tests(tests: GridRows) -> Drawn:
    title = (
        f"Against the rows without expansions, {CHOSEN_BY}: paired tests over queries, each its "
        "mean over the seeds; Holm's method over the collections"
    )
    header = ["collection", "system", "against", "difference", "ratio", "helped", "hurt",
              "t-test p", "t-test p, Holm", "randomisation p, Holm"]  # fmt: skip
    return title, header, [[row["collection"], *_test_cells(row)] for row in tests]


def _test_cells(row: Mapping[str, Any]) -> list[str]:
    """A test's row, after the collection."""
    adjusted = [row[f"{name}_holm"] for name in ("p_value", "randomisation_p_value")]
    return [
        row["system"],
        row["baseline"],
        f"{row['difference']:+.4f}",
        _NONE if row["ratio"] is None else f"{row['ratio']:.3f}",
        f"{100 * row['helped']:.1f} %",
        f"{100 * row['hurt']:.1f} %",
        f"{row['p_value']:.2g}",
        *((Bold if p < LEVEL else str)(f"{p:.2g}") for p in adjusted),
    ]


def _costs(costs: GridRows) -> Drawn:
    title = "What a query takes: tokens that are generated for it, and seconds"
    header = ["collection", "system", "tokens", "seconds"]
    cells = [
        [row["collection"], row["system"], _number(row["tokens_per_query"], ".1f"),
         _number(row["seconds_per_query"], ".4f")]
        for row in costs
    ]  # fmt: skip
    return title, header, cells


def _trainings(trainings: GridRows) -> Drawn:
    title = "What a cell took, and what it was made with"
    header = ["collection", "seed", "training, s", "in all, s", "peak memory, GB", "device",
              "revision"]  # fmt: skip
    cells = [
        [row["collection"], str(row["seed"]), _number(row["training_seconds"], ".0f"),
         _number(row["seconds"], ".0f"), _number(row["peak_memory_bytes"], ".2f", 1e9),
         row["device"] or _NONE, row["revision"][:12]]
        for row in trainings
    ]  # fmt: skip
    return title, header, cells


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return _NONE if value is None else f"{value / unit:{form}}"


def _long(
    collections: Sequence[Measured], rows: GridRows
) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Header and cells of a line for each row of results.json, a column for each seed."""
    seeds = list(dict.fromkeys(seed for one in collections for seed in one.seeds))
    of = {one.name: one.seeds for one in collections}
    names = ["collection", "system", "metric", "mean", "low", "high", "deviation"]
    cells = []
    for row in rows:
        each = dict(zip(of[row["collection"]], row["seeds"], strict=True))
        values = [row[name] for name in names] + [each.get(seed) for seed in seeds]
        cells.append(["" if value is None else str(value) for value in values])
    return [*names, *(f"seed {seed}" for seed in seeds)], cells


def _page(
    collections: Sequence[Measured], contents: Mapping[str, Any], tables: Sequence[Drawn]
) -> str:
    means, _, costs, trainings = tables
    sections = {"All collections": parts().table(*means)}
    for one in collections:
        sections[one.name] = _collection(one, contents)
    sections["What a query takes"] = parts().table(*costs)
    sections["What the cells took"] = parts().table(*trainings)
    lead = f"{len(collections)} collections, {len(means[2])} systems."
    if contents["missing"]:
        lead += f" Cells that are missing: {'; '.join(contents['missing'])}."
    return page.render_page("Does expansion pay?", lead, sections)


def _collection(one: Measured, contents: Mapping[str, Any]) -> Markup:
    """The part of the page on one collection."""
    here = [row for row in contents["rows"] if row["collection"] == one.name]
    metrics = list(dict.fromkeys(row["metric"] for row in here))
    by_system: dict[str, dict[str, Any]] = {}
    for row in here:
        by_system.setdefault(row["system"], {"system": row["system"]})[row["metric"]] = row["mean"]
    first = {name: {CHOSEN_BY: of[CHOSEN_BY]} for name, of in one.over_seeds.items()}
    rows = [{"system": name, **{m: row[m] for m in metrics}} for name, row in by_system.items()]
    tests = [_test_cells(row) for row in contents["tests"] if row["collection"] == one.name]
    title, header, _ = _tests([])
    return (
        results_section({"rows": rows}, first, OURS)
        + parts().table(title, header[1:], tests)
        + _moved(one)
    )


def _moved(one: Measured) -> Markup:
    """The queries that the best row with known passages helped and hurt most, beside these."""
    means = {system: of[CHOSEN_BY].mean() for system, of in one.values.items()}
    shown = [
        system for system in means
        if one.writer in one.writers.get(system, ()) and baselines(system, means)
    ]  # fmt: skip
    if not shown:
        return Markup()
    system = max(shown, key=means.get)
    baseline = baselines(system, means)[0]
    ours, theirs = (one.over_seeds[name][CHOSEN_BY] for name in (system, baseline))
    cards = [
        page.Card(
            one.texts.get(query) or query,
            "better" if ours[query] > theirs[query] else "worse",
            f"{theirs[query]:.4f} → {ours[query]:.4f}",
            f"query {query}",
            one.expansions.get(query, ""),
        )
        for query in moved_most(one, system, baseline, MOVED)
    ]
    note = (
        f"The queries that {system} helped most against {baseline}, and those that it hurt most, "
        f"by {CHOSEN_BY}, with the beginning of a passage of the {one.writer}."
    )
    return parts().cards(note, cards)
