"""Tables as rich text, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Sequence

import rich.markup
from rich.console import Console
from rich.table import Table

FORMATS = ("text", "markdown", "latex", "csv")
WIDE = 200  # Characters of a line where there is no terminal to fit into.
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


def render(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], form: str
) -> str | Table:
    """A table in one of `FORMATS`; "text" is rich's."""
    numbers = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    if form == "text":
        view = Table(title=title, title_justify="left")
        for name, number in zip(header, numbers, strict=True):
            view.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            view.add_row(*map(rich.markup.escape, row))
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
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDE)


def _is_number(cell: str) -> bool:
    try:
        float(cell or 0)
    except ValueError:
        return False
    return True


def _latex(cell: str) -> str:
    return "".join(_LATEX.get(character, character) for character in cell)
