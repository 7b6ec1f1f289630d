"""Compares runs: `python -m eval.compare runs/bm25.trec runs/dense.trec --qrels=qrels.trec`.

Each run's mean of each measure, and against the baseline (the first run, or --baseline): on how
many queries it wins, ties and loses, a paired t-test and a randomisation test, both two-sided, with
p-values that Holm's method adjusts for all comparisons of the table. --moved=N adds the queries
that changed most, with their passages where --expansions=FILE names evaluation/expansions.jsonl.
"""

import csv
import dataclasses
import io
import pathlib
from collections.abc import Mapping, Sequence

import rich.markup
from absl import flags
from rich.console import Console
from rich.table import Table

from expandr_jax import metrics
from expandr_jax.data.beir import Qrels, read_qrels
from expandr_jax.data.records import read_jsonl
from expandr_jax.errors import UserError
from train.launch import launch

Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # run -> measure -> query -> value

TESTS = (metrics.paired_test, metrics.randomisation_test)
FORMATS = ("text", "markdown", "latex", "csv")
WIDE = 200  # Characters of a line where there is no terminal to fit into.
HEADER = (
    "measure", "run", "mean", "difference", "win", "tie", "loss",
    "t-test p", "t-test p, Holm", "randomisation p", "randomisation p, Holm",
)  # fmt: skip
MOVED_HEADER = ("run", "query", "baseline", "value", "difference", "text", "expansions")
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: "\\" + character for character in "&%$#_{}"},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One run under one measure; what follows `mean` is None for the baseline.

    Attributes:
        measure: As the user wrote it.
        run: Its name.
        mean: Over the judged queries.
        difference: From the baseline's mean.
        win: Queries on which the run is better.
        tie: Queries on which both are the same.
        loss: Queries on which it is worse.
        p_values: Of the paired t-test and of the randomisation test.
        adjusted: The same for all comparisons made, by Holm's method.
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
            return head + [""] * (len(HEADER) - len(head))
        counts = [str(count) for count in (self.win, self.tie, self.loss)]
        pairs = zip(self.p_values, self.adjusted, strict=True)
        return [*head, f"{self.difference:+.4f}", *counts, *(f"{p:.4g}" for q in pairs for p in q)]


def score(paths: Sequence[pathlib.Path], qrels: Qrels, measures: Sequence[str]) -> Values:
    """Reads and scores runs, named by their files, or by their paths where names are the same.

    Raises:
        UserError: A run cannot be read or has no judged query, or a measure is unknown.
    """
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise UserError("a run is named twice; a run cannot be compared with itself")
    values = {}
    for name, path in zip(names, paths, strict=True):
        run = metrics.read_trec(path)
        if run.keys().isdisjoint(qrels):
            raise UserError(f"{path}: none of its {len(run)} queries is judged")
        values[name] = metrics.evaluate(run, qrels, measures)
    return values


def compare(values: Values, baseline: str) -> list[Comparison]:
    """Every run under every measure, measure by measure, the baseline first."""
    rows = []
    order = [baseline, *(run for run in values if run != baseline)]
    for measure, reference in values[baseline].items():
        for run in order:
            mine = values[run][measure]
            row = Comparison(measure, run, metrics.mean(mine))
            if run != baseline:
                differences = [mine[query] - value for query, value in reference.items()]
                tests = [test(mine, reference) for test in TESTS]
                row = dataclasses.replace(
                    row,
                    difference=tests[0]["difference"],
                    win=sum(d > 0 for d in differences),
                    tie=sum(d == 0 for d in differences),
                    loss=sum(d < 0 for d in differences),
                    p_values=tuple(test["p_value"] for test in tests),
                )
            rows.append(row)
    compared = [row for row in rows if row.p_values is not None]
    by_test = zip(*(row.p_values for row in compared), strict=True)
    adjusted = iter(list(zip(*map(metrics.holm, by_test), strict=True)))
    return [row if row.p_values is None else
            dataclasses.replace(row, adjusted=next(adjusted)) for row in rows]  # fmt: skip


def moved(
    values: Values,
    baseline: str,
    count: int,
    texts: Mapping[str, str],
    expansions: Mapping[tuple[str, str], Sequence[str]],
) -> list[list[str]]:
    """Rows of the queries that changed most under the first measure, run by run.

    Args:
        values: As from `score`.
        baseline: Name of the run that the others are compared with.
        count: Queries a run at most; one that did not change is never listed.
        texts: Query id -> its text.
        expansions: (run, query id) -> its expansions.
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


def main(arguments: Sequence[str]) -> None:
    settings = flags.FLAGS
    paths = [pathlib.Path(argument) for argument in arguments[1:]]
    if not paths or not settings.qrels:
        raise UserError("runs or --qrels missing: python -m eval.compare RUN RUN ... --qrels=FILE")
    if not settings.measures:
        raise UserError("--measures is empty; expected names such as ndcg@10,recall@100")
    if settings.expansions and not settings.moved:
        raise UserError("--expansions goes with --moved=N, the number of queries to show")
    qrels = read_qrels(settings.qrels)
    values = score(paths, qrels, settings.measures)
    baseline = settings.baseline or next(iter(values))
    if baseline not in values:
        raise UserError(f"--baseline={baseline}: no such run; there are {', '.join(values)}")
    title = f"{len(qrels)} queries, against {baseline}; Holm's method over all comparisons"
    rows = [row.cells() for row in compare(values, baseline)]
    tables = [render(title, HEADER, rows, settings.format)]
    if settings.moved:
        known = read_expansions(pathlib.Path(settings.expansions)) if settings.expansions else ()
        title = f"Queries that moved most in {settings.measures[0]}, against {baseline}"
        rows = moved(values, baseline, settings.moved, *(known or ({}, {})))
        tables.append(render(title, MOVED_HEADER, rows, settings.format))
    console = wide_console()
    for table in tables:
        console.print(table, markup=False, soft_wrap=isinstance(table, str))


def define_flags() -> None:
    flags.DEFINE_string("qrels", None, "Judgements: TREC's four columns, or .tsv as in BEIR.")
    flags.DEFINE_list("measures", ["ndcg@10", "mrr@10", "recall@100", "map"], "As ir-measures'.")
    flags.DEFINE_string("baseline", None, "Name of the run to compare with; the first.")
    flags.DEFINE_enum("format", "text", FORMATS, "Of the tables.")
    flags.DEFINE_integer("moved", 0, "Queries that moved most, for each run.", lower_bound=0)
    flags.DEFINE_string("expansions", None, "expansions.jsonl whose texts to show with them.")


if __name__ == "__main__":
    launch(main, define_flags)
