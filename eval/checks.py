"""Results of finished runs, and cells made of them: without contradictions, or refused."""

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax import metrics
from expandr_jax.data.beir import Qrels, read_qrels
from expandr_jax.errors import UserError, shown
from expandr_jax.metrics import METRICS
from expandr_jax.report.grid import COSTS
from expandr_jax.runtime.checksums import Checksums

_ROUNDED = 2e-6  # What means may differ by, when they and their parts are rounded.
_LARGEST = 1e300
Values = Mapping[str, Mapping[str, Sequence[float]]]  # System -> metric -> a value for each query.


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object of a finished run's file; UserError if there is none."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path}: cannot be read; expected a file of a finished run") from None


def read_timings(path: pathlib.Path) -> dict[str, Any]:
    """A run's timings.json; UserError if it cannot be read."""
    timings = read_object(path)
    try:
        wrong = next(_wrong_timings(timings), None)
    except (LookupError, TypeError, AttributeError):
        wrong = "it holds no phases and searches"
    if wrong:
        raise UserError(f"{path}: {wrong}; expected that of a finished run")
    return timings


def read_results(
    workdir: pathlib.Path, folder: str = ""
) -> tuple[dict[str, Any], Qrels, dict[str, dict[str, list[float]]]]:
    """What a finished run found.

    Args:
        workdir: The run.
        folder: Where in it the results are: "", or "tests/NAME".

    Returns:
        The contents of results.json, the judgements, and for each system of its rows metric -> the
        values of the queries, which are in the order of their ids.

    Raises:
        UserError: A file cannot be read, or is not what the run wrote.
    """
    own = workdir / folder
    results = read_object(own / "results.json")
    if wrong := next(_wrong_rows(results), None):
        raise UserError(f"{own / 'results.json'}: {wrong}; expected that of a finished run")
    names = "results.json", "qrels.trec", "runs", "evaluation"
    seals = Checksums(workdir, lambda _: None)
    if changed := seals.changed(*(f"{folder}/{name}" if folder else name for name in names)):
        raise UserError(
            f"{workdir / changed[0]}: is damaged or was removed; train.joint's same command makes "
            "it again"
        )
    qrels = read_qrels(own / "qrels.trec")
    queries, values = sorted(qrels), {}
    for row in results["rows"]:
        path = own / "runs" / f"{row['system']}.trec"
        if not path.exists():
            raise UserError(f"{path}: is not there; train.joint makes it")
        scores = metrics.evaluate(metrics.read_trec(path), qrels, METRICS)
        values[row["system"]] = {m: [of[query] for query in queries] for m, of in scores.items()}
    if wrong := next(_other_means(results, values), None):
        raise UserError(
            f"{own}: {wrong}; files of runs/ or qrels.trec are not those that results.json is of"
        )
    return results, qrels, values


def contradictions(cell: Any) -> Iterator[str]:
    """What within a cell of a table, whose fields are of their types, cannot be so."""
    count = len(cell.queries)
    if not count or len(set(cell.queries)) < count:
        yield f"{count} queries, {len(set(cell.queries))} of them different"
    if len(cell.texts) != count or len(cell.expansions) not in (0, count):
        yield f"not a text for each of {count} queries"
    if not all(isinstance(text, str) for text in (*cell.queries, *cell.texts, *cell.expansions)):
        yield "a query, or its text or expansion, is no text"
    if not cell.collection or "/" in cell.collection:
        yield f"its collection is called {shown(cell.collection)}"
    if type(cell.seed) is not int or cell.config.get("seed") != cell.seed:
        yield f"its seed is {shown(cell.seed)}, and in its config {shown(cell.config.get('seed'))}"
    yield from _wrong_rows(cell.results)
    yield from _wrong_timings(cell.timings)
    if {row["system"] for row in cell.results["rows"]} != cell.values.keys():
        yield "results and values are of other systems"
    for system, of in cell.values.items():
        for metric in METRICS:
            if len(of[metric]) != count or not all(_is_number(value, 1) for value in of[metric]):
                yield (f"values of {system} in {metric} are not a number from 0 to 1 for each "
                       "query")  # fmt: skip
    yield from _other_means(cell.results, cell.values)
    for system, costs in cell.costs.items():
        numbers = all(value is None or _is_number(value) for value in costs.values())
        if costs.keys() != {*COSTS} or not numbers:
            yield f"costs of {system} are {shown(costs)}"


def _wrong_timings(timings: Mapping[str, Any]) -> Iterator[str]:
    """What a timings.json cannot say; runs of older code have not all of it.

    It may be anything: LookupError, TypeError or AttributeError where it has another form.
    """
    for phase in timings.get("phases", []):
        named = isinstance(phase["phase"], str) and isinstance(phase.get("device", ""), str)
        if not named or not _is_number(phase["seconds"]):
            yield f"its timings have a phase {shown(phase)}"
    for search in timings.get("searches", []):
        if not _is_number(search["seconds"]) or not _is_number(search["queries"]):
            yield f"its timings have a search {shown(search)}"
    for name in ("total_seconds", "peak_memory_bytes"):
        if not _is_number(timings.get(name) or 0):
            yield f"its timings have {name} {shown(timings[name])}"


def _wrong_rows(results: Mapping[str, Any]) -> Iterator[str]:
    """What is no row for each system, one at least, in a results.json."""
    rows = results.get("rows")
    if not isinstance(rows, list) or not rows or not isinstance(results.get("chosen"), dict):
        yield "it has no rows, or nothing that was chosen"
        return
    seen = set()
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("system"), str):
            yield f"it has a row {shown(row)}"
            return
        if row["system"] in seen:
            yield f"it has two rows of {row['system']}"
        seen.add(row["system"])
        for metric in METRICS:
            if not _is_number(row.get(metric), 1):
                yield f"{row['system']} has {metric} {shown(row.get(metric))}"


def _other_means(results: Mapping[str, Any], values: Values) -> Iterator[str]:
    """Rows of a results.json whose means are not those of the values."""
    for row in results["rows"]:
        for metric in METRICS:
            mean = float(np.mean(values[row["system"]][metric]))
            if not abs(mean - row[metric]) <= _ROUNDED:
                yield (f"{row['system']} has {metric} {row[metric]} in results and {mean:.6f} by "
                       "its values")  # fmt: skip


def _is_number(value: Any, most: float = _LARGEST) -> bool:
    """Whether a JSON value is a number from 0 to `most`; true, NaN and the infinite are none."""
    return type(value) in (int, float) and 0 <= value <= most
