"""Tables of `eval.beir` as Markdown, LaTeX, CSV and rich text, and its results as an HTML page."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.table import Table

from expandr_jax import metrics
from expandr_jax.files.records import write_text
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.ranking.results import QueryMetrics
from expandr_jax.report import page, plots
from expandr_jax.report.differences import DIFFERENCES_HEADER, compare, moved, read_expansions
from expandr_jax.report.page import parts
from expandr_jax.report.run_report import results_section, settings_section, time_section
from expandr_jax.report.tables import mark_best, render, results_cells

TABLE_SUFFIXES = {"markdown": ".md", "latex": ".tex", "csv": ".csv"}
CURVES = 6  # Systems whose gains by query are drawn: those that differ most from the baseline.
MOVED = 12  # Queries that are shown.
EXPANSION_CHARACTERS = 500  # A query's texts are cut to these.


def write_tables(
    path: pathlib.Path,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    remarks: Sequence[str] = (),
) -> Table:
    """Writes a table to path.md, .tex and .csv, and returns it as rich text.

    What there is to remark on it stands below it in path.md.
    """
    for form, suffix in TABLE_SUFFIXES.items():
        below = "".join(f"\n{remark}\n" for remark in remarks) if form == "markdown" else ""
        write_text(path.with_suffix(suffix), render(title, header, rows, form) + below)
    return render(title, header, rows)


def write_set(
    directory: pathlib.Path,
    results: Mapping[str, Any],
    values: QueryMetrics,
    texts: Mapping[str, str],
) -> None:
    """Writes results.md, .tex and .csv and report.html of one set.

    The directory is the set's own and holds evaluation/expansions.jsonl; `texts` are its queries'.
    """
    title = f"{results['dataset']}, {results['queries']:,} queries"
    told = results.get("remarks", ())
    write_tables(directory / "results", title, *results_cells(results["rows"]), told)
    _, expansions = read_expansions(directory / "evaluation" / "expansions.jsonl")
    sections = {
        **_sections(results, values, results["rows"][0]["system"], texts, expansions),
        "Where the time went": time_section(directory),
        "Settings": settings_section(directory, results),
    }
    _write_page(
        directory / "report.html",
        f"Systems on {results['dataset']}",
        f"{results['queries']:,} queries, {len(results['rows'])} systems.",
        sections,
    )


def write_mean(workdir: pathlib.Path, mean: Mapping[str, Any]) -> Table:
    """Writes mean.md, .tex and .csv and report.html of a run's several sets; returns the table.

    `mean` is as from `mean_over_sets`.
    """
    columns = [[row[CHOSEN_BY] for row in of] for of in (*mean["sets"].values(), mean["rows"])]
    names = [row["system"] for row in mean["rows"]]
    title = f"{CHOSEN_BY} over {len(mean['sets'])} sets"
    header, rows = ["system", *mean["sets"], "mean"], mark_best(names, *columns)
    chart = plots.bars(
        f"Mean {CHOSEN_BY} of each system", dict(zip(names, columns[-1], strict=True))
    )
    caption = "Sets of one family, as CQADupStack's twelve, count as one; the best is bold."
    sections = {
        "By set": parts().table(caption, header, rows)
        + parts().figures({f"Mean {CHOSEN_BY}": chart}),
        "All measures": parts().table("Means over the sets.", *results_cells(mean["rows"])),
        "Where the time went": time_section(workdir),
        "Settings": settings_section(workdir, {}),
    }
    _write_page(
        workdir / "report.html", f"Systems on {len(mean['sets'])} sets", f"{title}.", sections
    )
    return write_tables(workdir / "mean", title, header, rows)


def write_comparison(
    path: pathlib.Path,
    values: QueryMetrics,
    baseline: str,
    texts: Mapping[str, str],
    expansions: Mapping[tuple[str, str], Sequence[str]],
) -> None:
    """Writes a page on runs from anywhere and their differences from one of them.

    Texts are queries' by their ids, expansions by run and query id.
    """
    # Not `summary`, which rounds: these are rounded once, as the differences below them are.
    rows = [{"system": run, **{m: metrics.mean(of[m]) for m in of}} for run, of in values.items()]
    sections = _sections({"rows": rows}, values, baseline, texts, expansions)
    queries = len(next(iter(values[baseline].values())))
    lead = f"{queries:,} queries, {len(values)} runs, compared with {baseline}."
    _write_page(path, "Runs compared", lead, sections)


def _sections(
    results: Mapping[str, Any],
    values: QueryMetrics,
    baseline: str,
    texts: Mapping[str, str],
    expansions: Mapping[tuple[str, str], Sequence[str]],
) -> dict[str, Markup]:
    """Sections on results, and on differences from a baseline under the first measure."""
    sections = {"Results": results_section(results, values)}
    if len(values) < 2:
        return sections
    measure = next(iter(values[baseline]))
    first = {run: {measure: of[measure]} for run, of in values.items()}
    rows = [row.cells()[1:] for row in compare(first, baseline)]
    caption = (
        f"{measure}; queries that a system wins, ties and loses; two-sided tests, and the same "
        "adjusted by Holm's method for all rows."
    )
    gains = {f"Gain in {measure} by query, sorted": _gains(first, baseline, measure)}
    return {
        **sections,
        f"Against {baseline}": parts().table(caption, DIFFERENCES_HEADER[1:], rows)
        + parts().figures(gains),
        "Queries that moved most": _moved(first, baseline, texts, expansions),
    }


def _gains(values: QueryMetrics, baseline: str, measure: str) -> str:
    reference = values[baseline][measure]
    gains = {
        run: sorted(
            (of[measure][query] - value for query, value in reference.items()), reverse=True
        )
        for run, of in values.items()
        if run != baseline
    }
    shown = sorted(gains, key=lambda run: -abs(sum(gains[run])))[:CURVES]
    series = {run: (range(1, len(gains[run]) + 1), gains[run]) for run in gains if run in shown}
    title = f"Gain in {measure} over {baseline}: {', '.join(series)}"
    return plots.lines(title, series, xlabel="queries, by gain", ylabel=f"gain in {measure}",
                       smooth=False)  # fmt: skip


def _moved(
    values: QueryMetrics,
    baseline: str,
    texts: Mapping[str, str],
    expansions: Mapping[tuple[str, str], Sequence[str]],
) -> Markup:
    rows = moved(values, baseline, MOVED, texts, expansions)
    largest: dict[str, Sequence[str]] = {}  # A query stands once, with its largest change.
    for row in sorted(rows, key=lambda row: -abs(float(row[4]))):
        largest.setdefault(row[1], row)
    cards = []
    for run, query, before, after, difference, text, expansion in list(largest.values())[:MOVED]:
        trend = "better" if float(difference) > 0 else "worse"
        quote = page.clip(expansion, EXPANSION_CHARACTERS)
        change, note = f"{before} → {after}", f"{run}, query {query}"
        cards.append(page.Card(text or query, trend, change, note, quote))
    note = f"The {len(cards)} queries with the largest change against {baseline}."
    return parts().cards(note, cards)


def _write_page(
    path: pathlib.Path, title: str, lead: str, sections: Mapping[str, Markup | None]
) -> None:
    present = {name: content for name, content in sections.items() if content}
    write_text(path, page.render_page(title, lead, present))
