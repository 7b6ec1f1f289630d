"""Compares runs: `python -m eval.compare runs/bm25.trec runs/dense.trec --qrels=qrels.trec`.

Each run's mean of each measure, and against the baseline (the first run, or --baseline): on how
many queries it wins, ties and loses, a paired t-test and a randomisation test, both two-sided, with
p-values that Holm's method adjusts for all comparisons of the table. --moved=N adds the queries
that changed most, with their passages where --expansions=FILE names evaluation/expansions.jsonl.
--html=FILE writes all of it as one page, with plots. --published=FILE, a table of means that others
have published (system, collection, metric, value: CSV with a header, or a JSON list of objects),
adds which runs are above which of them; --collection=NAME says which rows of it count.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from expandr_jax import metrics
from expandr_jax.data.beir import Qrels, read_qrels
from expandr_jax.errors import UserError
from expandr_jax.ranking.results import QueryMetrics
from expandr_jax.report.differences import (
    DIFFERENCES_HEADER,
    MOVED_HEADER,
    compare,
    moved,
    read_expansions,
)
from expandr_jax.report.published import PUBLISHED_HEADER, published_rows, read_published
from expandr_jax.report.tables import TABLE_FORMATS, render, wide_console
from train.launch import launch


def score(paths: Sequence[pathlib.Path], qrels: Qrels, measures: Sequence[str]) -> QueryMetrics:
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
        if not run:
            raise UserError(f"{path}: empty; expected lines of qid Q0 docid rank score tag")
        if run.keys().isdisjoint(qrels):
            raise UserError(f"{path}: none of its {len(run)} queries is judged")
        values[name] = metrics.evaluate(run, qrels, measures)
    return values


def main(arguments: Sequence[str]) -> None:
    settings = flags.FLAGS
    paths = [pathlib.Path(argument) for argument in arguments[1:]]
    if not paths or not settings.qrels:
        raise UserError("runs or --qrels missing: python -m eval.compare RUN RUN ... --qrels=FILE")
    if not settings.measures:
        raise UserError("--measures is empty; expected names such as ndcg@10,recall@100")
    if settings.expansions and not settings.moved and not settings.html:
        raise UserError(
            "--expansions goes with --moved=N, the number of queries to show, or --html"
        )
    if settings.collection and not settings.published:
        raise UserError("--collection goes with --published=FILE")
    published = []
    if settings.published:
        published = read_published(pathlib.Path(settings.published), settings.collection)
    qrels = read_qrels(settings.qrels)
    if not qrels:
        raise UserError(f"{settings.qrels}: no judgements; expected qid 0 docid relevance")
    values = score(paths, qrels, settings.measures)
    baseline = settings.baseline or next(iter(values))
    if baseline not in values:
        raise UserError(f"--baseline={baseline}: no such run; there are {', '.join(values)}")
    title = f"{len(qrels)} queries, against {baseline}; Holm's method over all comparisons"
    rows = [row.cells() for row in compare(values, baseline)]
    tables = [render(title, DIFFERENCES_HEADER, rows, settings.format)]
    known = ({}, {})
    if settings.expansions:
        known = read_expansions(pathlib.Path(settings.expansions))
    if settings.moved:
        title = f"Queries that moved most in {settings.measures[0]}, against {baseline}"
        rows = moved(values, baseline, settings.moved, *known)
        tables.append(render(title, MOVED_HEADER, rows, settings.format))
    if published:
        title = f"Published on {published[0].collection}; intervals are over the runs' queries"
        measures = list(dict.fromkeys(one.metric for one in published))
        rows = published_rows(published, score(paths, qrels, measures))
        tables.append(render(title, PUBLISHED_HEADER, rows, settings.format))
    console = wide_console()
    for table in tables:
        console.print(table, markup=False, soft_wrap=isinstance(table, str))
    if settings.html:
        from expandr_jax.report.pages import write_comparison  # Models take a second to import.

        write_comparison(pathlib.Path(settings.html), values, baseline, *known)


def define_flags() -> None:
    flags.DEFINE_string("qrels", None, "Judgements: TREC's four columns, or .tsv as in BEIR.")
    flags.DEFINE_list("measures", ["ndcg@10", "mrr@10", "recall@100", "map"], "As ir-measures'.")
    flags.DEFINE_string("baseline", None, "Name of the run to compare with; the first.")
    flags.DEFINE_enum("format", "text", TABLE_FORMATS, "How tables are printed.")
    flags.DEFINE_integer("moved", 0, "Queries that moved most, for each run.", lower_bound=0)
    flags.DEFINE_string("expansions", None, "expansions.jsonl whose texts to show with them.")
    flags.DEFINE_string("published", None, "Means to compare with: a CSV or JSON table.")
    flags.DEFINE_string("collection", None, "Whose means of --published; its only one's.")
    flags.DEFINE_string("html", None, "Also write a page with tables and plots here.")


if __name__ == "__main__":
    launch(main, define_flags, words=True)
