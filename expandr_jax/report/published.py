"""Published means, and how our runs compare with them.

A table of them has the fields system, collection, metric and value, as CSV with a header or as a
JSON list of objects. Values are shares of 1, as 0.645; as many digits as they have are compared.
"""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.errors import UserError, shown
from expandr_jax.files.records import decode_line, read_lines
from expandr_jax.ranking.results import QueryMetrics

PUBLISHED_FIELDS = ("system", "collection", "metric", "value")
PUBLISHED_HEADER = (
    "measure", "published", "value", "run", "mean", "95 % from", "to", "difference", "the run is",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """One mean: whose, on what, by which measure; and how many digits it is given with."""

    system: str
    collection: str
    metric: str
    value: float
    digits: int


def read_published(path: pathlib.Path, collection: str | None) -> list[Published]:
    """The means of a table that are of one collection; None: of the only one that it has.

    Raises:
        UserError: The file cannot be read, a row lacks a field, has a metric that is unknown or a
            value that is none, two say the same otherwise, or there are none of the collection.
    """
    found: dict[tuple[str, str, str], Published] = {}
    for where, row in _rows(path):
        one = _published(where, row)
        key = one.system, one.collection, metrics.measure_key(one.metric)
        if found.setdefault(key, one).value != one.value:
            raise UserError(
                f"{where}: {one.system} has another {one.metric} on {one.collection} above"
            )
    known = sorted({one.collection for one in found.values()})
    if not known:
        raise UserError(f"{path}: empty; expected rows of {', '.join(PUBLISHED_FIELDS)}")
    if collection is None and len(known) > 1:
        raise UserError(f"{path}: has {', '.join(known)}; choose one by --collection=NAME")
    chosen = known[0] if collection is None else collection
    if chosen not in known:
        raise UserError(f"{path}: nothing on {chosen!r}; there is {', '.join(known)}")
    return [one for one in found.values() if one.collection == chosen]


def published_rows(published: Sequence[Published], values: QueryMetrics) -> list[list[str]]:
    """Rows of `PUBLISHED_HEADER`, for each published mean one of each run that has its measure.

    Means are rounded to the digits of the published one before they are compared. The interval is
    the bootstrap's over the queries; of others' queries nothing is known, so nothing is tested.
    """
    rows = []
    for one in published:
        for run, by_measure in values.items():
            of_query = by_measure.get(one.metric)
            if of_query is None:
                continue
            mean = metrics.mean(of_query)
            low, high = metrics.bootstrap_interval(list(of_query.values()))
            difference = round(round(mean, one.digits) - one.value, one.digits)
            place = "above" if difference > 0 else "below" if difference < 0 else "equal"
            rows.append([
                one.metric, one.system, f"{one.value:.{one.digits}f}", run,
                *(f"{x:.4f}" for x in (mean, low, high)), f"{mean - one.value:+.4f}", place,
            ])  # fmt: skip
    return rows


def _rows(path: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row stands, and its fields."""
    lines = [decode_line(f"{path}:{number}", line) for number, line in read_lines(path)]
    text = "".join(lines)
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text, parse_float=str, parse_int=str)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON: {error}") from None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(
                f"{path}: expected a JSON list of objects with {', '.join(PUBLISHED_FIELDS)}"
            )
        yield from ((f"{path}: number {number}", row) for number, row in enumerate(rows, start=1))
        return
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    try:
        lacking = [field for field in PUBLISHED_FIELDS if field not in (reader.fieldnames or ())]
        if lacking:
            raise UserError(f"{path}:1: no column {', '.join(lacking)}; expected a header")
        for field in PUBLISHED_FIELDS:
            if reader.fieldnames.count(field) > 1:
                raise UserError(f"{path}:1: column {field} stands twice; expected it once")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if any(row.pop(None, ())):  # 0,645 would be read as 0.
                raise UserError(
                    f"{where}: more columns than the header; expected 0.645 with a point, and "
                    "quotes round a text with commas"
                )
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from None


def _published(where: str, row: Mapping[str, Any]) -> Published:
    for field in PUBLISHED_FIELDS:
        text = row.get(field)
        if not isinstance(text, str) or not text.strip() or not text.strip().isprintable():
            raise UserError(f"{where}: {field} is {shown(row.get(field))}; expected some text")
    system, collection, metric, text = (row[field].strip() for field in PUBLISHED_FIELDS)
    try:
        metrics.measure_key(metric)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 or "_" in text:
        raise UserError(f"{where}: value is {text}; expected a share of 1, as 0.645")
    digits = len(text.partition(".")[2]) if text.replace(".", "", 1).isdigit() else 6
    return Published(system, collection, metric, value, digits)
