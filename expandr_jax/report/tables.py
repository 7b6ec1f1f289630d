"""Tables as rich text, Markdown, LaTeX and CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from expandr_jax.runtime.progress import plain_console

TABLE_FORMATS = ("text", "markdown", "latex", "csv")
WIDE = 200  # Characters of a line where there is no terminal to fit into.
# A number, a share in per cent, or either with an interval or its spread after it.
_NUMBER = re.compile(r"[+-]?[\d,.]+(e[+-]?\d+)?( ?%)?( \[[\d., -]+\])?( \([\d.]+\))?")
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


class Bold(str):
    """A cell that stands out where a table has bold text: rich text and HTML."""

    bold = True


def results_cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the rows of a results.json; the best of each metric is bold."""
    header = list(rows[0]) if rows else ["system"]
    return header, mark_best(*([row[name] for row in rows] for name in header))


def mark_best(names: Sequence[str], *columns: Sequence[float]) -> list[list[str]]:
    """Rows of a name and a value of each column, the best of which is bold."""
    cells = []
    for column in columns:
        texts, best = [f"{value:.4f}" for value in column], max(column, default=None)
        cells.append([Bold(t) if v == best else t for t, v in zip(texts, column, strict=True)])
    return [list(row) for row in zip(names, *cells, strict=True)]


def render(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], form: str = "text"
) -> str | Table:
    """A table in one of `TABLE_FORMATS`, "text" by rich; columns of numbers are right-aligned."""
    numbers = [
        all(not row[i] or _NUMBER.fullmatch(row[i]) for row in rows) for i in range(len(header))
    ]
    if form == "text":
        view = Table(title=title, title_justify="left")
        for name, number in zip(header, numbers, strict=True):
            view.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            view.add_row(*(Text(cell, "bold" * isinstance(cell, Bold)) for cell in row))
        return view
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([header, *rows])
        return text.getvalue()
    if form == "markdown":
        rule = ["---:" if number else "---" for number in numbers]
        lines = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
        lines.insert(1, rule)
        return "\n".join([f"{title}\n", *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"
    columns = "".join("r" if number else "l" for number in numbers)
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in (header, *rows)]
    body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    start = [f"% {title}", rf"\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*start, *body, r"\end{tabular}"]) + "\n"


def wide_console() -> Console:
    """A console that squeezes tables into the terminal's width only where there is one."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=WIDE)


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in cell)
