"""`eval.compare` on three small runs whose metrics are known."""

import csv
import io
import json
import pathlib

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from eval.compare import score
from expandr_jax import metrics
from expandr_jax.errors import UserError
from expandr_jax.report.differences import DIFFERENCES_HEADER, compare, moved, read_expansions
from expandr_jax.report.tables import TABLE_FORMATS, render
from tests.commands import command, finish

QRELS = {f"q{i}": {"d1": 1} for i in range(8)}
RANKS = {  # The one relevant document's, query by query; 0: not found.
    "base": [1, 2, 3, 4, 5, 6, 0, 2],
    "better": [1, 1, 1, 2, 2, 1, 4, 1],
    "other": [2, 2, 1, 4, 0, 6, 0, 2],
}


@pytest.fixture
def paths(tmp_path):
    """The runs, and qrels.trec beside them."""
    metrics.write_qrels(tmp_path / "qrels.trec", QRELS)
    for name, ranks in RANKS.items():
        run = {}
        for query, rank in zip(QRELS, ranks, strict=True):
            found = [f"x{i}" for i in range(1, 10)]
            if rank:
                found[rank - 1] = "d1"
            run[query] = {document: -float(i) for i, document in enumerate(found)}
        metrics.write_trec(tmp_path / f"{name}.trec", run, name)
    return [tmp_path / f"{name}.trec" for name in RANKS]


def reciprocal(name):
    return [1 / rank if rank else 0.0 for rank in RANKS[name]]


def test_means_counts_and_tests(paths):
    rows = compare(score(paths, QRELS, ["mrr@10", "p@1"]), "base")
    assert [(row.measure, row.run) for row in rows] == [
        (measure, run) for measure in ("mrr@10", "p@1") for run in RANKS
    ]
    base, better, other = rows[:3]
    assert base.mean == pytest.approx(np.mean(reciprocal("base")))
    assert base.p_values is None
    assert (better.win, better.tie, better.loss) == (7, 1, 0)
    assert (other.win, other.tie, other.loss) == (1, 5, 2)
    for row in (better, other):
        expected = reciprocal(row.run), reciprocal("base")
        assert row.difference == pytest.approx(np.mean(expected[0]) - np.mean(expected[1]))
        assert row.p_values[0] == pytest.approx(scipy.stats.ttest_rel(*expected).pvalue)
    # Swapped at random, all seven differences keep their sign twice in 2 ** 7 times.
    assert better.p_values[1] == pytest.approx(2 / 2**7, abs=0.005)


def test_holm_covers_every_comparison_of_the_table(paths):
    rows = compare(score(paths, QRELS, ["mrr@10", "p@1"]), "base")
    compared = [row for row in rows if row.p_values]
    assert len(compared) == 4
    for test in range(2):
        expected = metrics.holm([row.p_values[test] for row in compared])
        assert [row.adjusted[test] for row in compared] == expected
        assert min(expected) == 4 * min(row.p_values[test] for row in compared)


def test_another_baseline_comes_first(paths):
    rows = compare(score(paths, QRELS, ["mrr@10"]), "better")
    assert [row.run for row in rows] == ["better", "base", "other"]
    assert (rows[1].win, rows[1].loss) == (0, 7)
    assert compare(score(paths[:1], QRELS, ["mrr@10"]), "base")[0].adjusted is None


def test_queries_that_moved_most_with_their_expansions(paths, tmp_path):
    file = tmp_path / "expansions.jsonl"
    lines = [
        {"query_id": "q5", "system": "better", "sample": i, "query": "six", "expansion": text}
        for i, text in enumerate(["one\ntext", "another"])
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = moved(score(paths, QRELS, ["mrr@10"]), "base", 2, *read_expansions(file))
    assert rows[0] == [
        "better", "q5", "0.1667", "1.0000", "+0.8333", "six", "one text | another",
    ]  # fmt: skip
    assert [(row[0], row[1], row[4]) for row in rows[1:]] == [
        ("better", "q2", "+0.6667"),
        ("other", "q2", "+0.6667"),
        ("other", "q0", "-0.5000"),
    ]


def test_the_same_cells_in_every_format(paths):
    rows = [row.cells() for row in compare(score(paths, QRELS, ["mrr@10"]), "base")]
    assert all(len(row) == len(DIFFERENCES_HEADER) for row in rows)
    tables = {
        form: render("a 100 % title", DIFFERENCES_HEADER, rows, form) for form in TABLE_FORMATS
    }
    console = Console(file=io.StringIO(), width=200)
    console.print(tables["text"])
    tables["text"] = console.file.getvalue()
    assert list(csv.reader(io.StringIO(tables["csv"]))) == [list(DIFFERENCES_HEADER), *rows]
    markdown = tables["markdown"].splitlines()
    assert [cell.strip() for cell in markdown[5].strip("|").split("|")] == rows[1]
    assert r"mrr@10 & better & 0.7812 & +0.4125 & 7 & 1 & 0" in tables["latex"]
    for form, table in tables.items():
        assert "+0.4125" in table, form
    assert render("t", ("a_b", "50 %"), [["x|y", "1"]], "latex").count(r"\_") == 1
    assert r"x\|y" in render("t", ("a", "b"), [["x|y", "1"]], "markdown")


def test_as_a_command_with_beir_judgements(paths, tmp_path):
    lines = ["query-id\tcorpus-id\tscore", *(f"{query}\td1\t1" for query in QRELS)]
    (tmp_path / "test.tsv").write_text("\n".join(lines) + "\n")
    arguments = [*map(str, paths), f"--qrels={tmp_path / 'test.tsv'}", "--measures=mrr@10,p@1"]
    options = ["--format=csv", "--moved=1", f"--html={tmp_path / 'page.html'}"]
    output = finish(command("eval.compare", *arguments, *options))
    rows = list(csv.reader(io.StringIO(output)))
    assert [row[:2] for row in rows[1:4]] == [["mrr@10", name] for name in RANKS]
    assert ["better", "q5", "0.1667", "1.0000", "+0.8333", "", ""] in rows
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Against base</h2>" in page
    assert "0.1667 → 1.0000" in page
    assert page.count("<svg") == 2  # means, and gains by query
    for row in rows[1:4]:
        assert f"<td>{row[2]}</td>" in page or f"<strong>{row[2]}</strong>" in page


def test_mistakes_get_one_line(paths, tmp_path):
    qrels = f"--qrels={tmp_path / 'qrels.trec'}"
    bad = tmp_path / "bad.trec"
    bad.write_text("q0 Q0 d1 1\n")
    (tmp_path / "empty").write_text("\n")
    for arguments, complaint in (
        ([str(bad), qrels], "bad.trec:1: 4 columns"),
        ([str(paths[0]), f"--qrels={tmp_path / 'empty'}"], "empty: no judgements"),
        ([str(paths[0]), qrels, "--baseline=none"], "no such run; there are base"),
        ([str(paths[0])], "--qrels missing"),
    ):
        process = command("eval.compare", *arguments)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2
        assert complaint in output
        assert len(output.strip().splitlines()) == 1


def test_runs_that_cannot_be_compared_are_refused(paths, tmp_path):
    with pytest.raises(UserError, match="none of its 8 queries is judged"):
        score(paths, {"elsewhere": {"d1": 1}}, ["mrr@10"])
    (tmp_path / "empty.trec").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.trec: empty; expected lines of qid"):
        score([paths[0], tmp_path / "empty.trec"], QRELS, ["mrr@10"])
    with pytest.raises(UserError, match="named twice"):
        score([paths[0], pathlib.Path(paths[0])], QRELS, ["mrr@10"])
    (tmp_path / "more").mkdir()
    twin = tmp_path / "more" / "base.trec"
    twin.write_bytes(paths[0].read_bytes())
    assert list(score([paths[0], twin], QRELS, ["mrr@10"])) == [str(paths[0]), str(twin)]
