"""The table over collections and seeds: its cells, what it says of them, and how they are made."""

import csv
import dataclasses
import gzip
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from scipy import stats

from configs import public
from eval import table
from eval.cells import cell_of_run, measured, read_cell, write_cell
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.metrics import METRICS
from expandr_jax.ranking.baselines import baselines
from expandr_jax.report.grid import Measured, comparisons_of, grid_rows
from expandr_jax.runtime.progress import QUIET
from tests.commands import command, error_of, finish, until
from train.launch import config_of

TINY = """
from configs import smoke

def get_config(collection="pydoc"):
    config = smoke.get_config()
    if collection != "pydoc":
        config.data.kind, config.data.path = "beir", collection
    return config
"""
# A program in the place of train.joint.
FAKE = """
import shutil, sys
print("error: the disk of", sys.argv[1], "is full")
sys.exit(2)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="module")
def cell(smoke):
    return cell_of_run(smoke[0], "pydoc")


def altered(cell, collection, seed):
    """The cell of another collection or seed: the same queries, other values."""
    random = np.random.default_rng([seed, len(collection)])
    values = {
        system: {m: np.round(random.random(len(cell.queries)), 6).tolist() for m in METRICS}
        for system in cell.values
    }
    rows = [{"system": system, **{m: round(float(np.mean(of[m])), 6) for m in METRICS}}
            for system, of in values.items()]  # fmt: skip
    config = json.loads(json.dumps(cell.config))
    config["seed"] = seed
    if collection != "pydoc":
        config["data"].update(kind="beir", path=collection)
    return dataclasses.replace(
        cell, collection=collection, seed=seed, values=values, config=config,
        results={**cell.results, "rows": rows},
    )  # fmt: skip


@pytest.fixture
def packed(cell, tmp_path):
    """A directory with the cells of two collections and two seeds."""
    for collection in ("pydoc", "toy"):
        for seed in (0, 1):
            made = altered(cell, collection, seed)
            write_cell(tmp_path / "packed" / f"{made.name}.json.gz", made)
    return tmp_path / "packed"


def test_rows_are_compared_with_those_without_expansions():
    rows = [
        "bm25", "zero-shot", "zero-shot+hyde", "zero-shot@d2q+hyde", "fine-tuned", "expandr",
        "expandr-plain", "expandr-gated", "fine-tuned-all", "bm25+rm3", "expandr+prf-rocchio",
        "fine-tuned+prf-rocchio", "interpolation:bm25:expandr", "interpolation:bm25:fine-tuned",
        "interpolation:bm25:fine-tuned-all", "rerank:rrf:bm25+hyde:expandr",
        "rerank:rrf:bm25:fine-tuned", "bm25+hyde", "interpolation:bm25:fine-tuned+prf-rocchio",
        "rerank:rrf:bm25+rm3:fine-tuned",
    ]  # fmt: skip
    found = {row: baselines(row, rows) for row in rows}
    unexpanded = ["fine-tuned-all", "fine-tuned", "expandr-plain", "fine-tuned+prf-rocchio"]
    fused = [f"interpolation:bm25:{name}" for name in unexpanded if name != "expandr-plain"]
    assert {row: against for row, against in found.items() if against} == {
        "zero-shot+hyde": ["zero-shot"],
        "zero-shot@d2q+hyde": ["zero-shot"],
        "expandr": unexpanded,
        "expandr-gated": unexpanded,
        "bm25+rm3": ["bm25"],
        "expandr+prf-rocchio": ["fine-tuned+prf-rocchio"],
        "fine-tuned+prf-rocchio": ["fine-tuned"],
        "interpolation:bm25:expandr": fused,
        "interpolation:bm25:fine-tuned+prf-rocchio": ["interpolation:bm25:fine-tuned"],
        "bm25+hyde": ["bm25", "bm25+rm3"],
        "rerank:rrf:bm25+hyde:expandr": [
            "rerank:rrf:bm25:fine-tuned", "rerank:rrf:bm25+rm3:fine-tuned",
        ],
        "rerank:rrf:bm25+rm3:fine-tuned": ["rerank:rrf:bm25:fine-tuned"],
    }  # fmt: skip


def toy(name, seed, gain):
    """A collection whose row "expandr" is above "fine-tuned" by about `gain`, in three seeds."""
    random = np.random.default_rng(seed)
    below = random.random((3, 60)) * 0.7
    above = below + gain + random.normal(0, 0.1, (3, 60))
    above[:, :5] = below[::-1, :5]  # The same over the seeds, in another order.
    queries = [f"q{i}" for i in range(60)]
    of = {"fine-tuned": below, "expandr": above}
    return Measured(name, (0, 1, 2), queries, {s: {"ndcg@10": v} for s, v in of.items()})


def test_intervals_and_deviations_are_those_of_scipy_and_numpy():
    one = toy("one", 1, 0.05)
    for row in grid_rows([one]):
        values = one.values[row["system"]]["ndcg@10"]
        assert row["mean"] == pytest.approx(values.mean(), abs=1e-6)
        assert row["seeds"] == pytest.approx(values.mean(axis=1), abs=1e-6)
        assert row["deviation"] == pytest.approx(stats.tstd(values.mean(axis=1)), abs=1e-6)
        drawn = stats.bootstrap(
            (values.mean(axis=0),), np.mean, method="percentile", n_resamples=20_000,
            rng=np.random.default_rng(5),
        ).confidence_interval  # fmt: skip
        spread = drawn.high - drawn.low
        assert (row["low"], row["high"]) == pytest.approx(tuple(drawn), abs=0.03 * spread)
    single = dataclasses.replace(
        one, seeds=(0,), values={s: {"ndcg@10": of["ndcg@10"][:1]} for s, of in one.values.items()}
    )
    assert {row["deviation"] for row in grid_rows([single])} == {None}


def test_tests_are_over_queries_and_adjusted_over_the_collections():
    collections = [toy("one", 1, 0.02), toy("two", 2, 0.03), toy("three", 3, 0.0)]
    rows = comparisons_of(collections)
    assert [row["collection"] for row in rows] == ["one", "two", "three"]
    raw = []
    for one, row in zip(collections, rows, strict=True):
        assert (row["system"], row["baseline"]) == ("expandr", "fine-tuned")
        ours, theirs = (one.values[s]["ndcg@10"].mean(axis=0) for s in ("expandr", "fine-tuned"))
        raw.append(stats.ttest_rel(ours, theirs).pvalue)
        assert row["p_value"] == pytest.approx(raw[-1], rel=1e-6)
        assert row["difference"] == pytest.approx((ours - theirs).mean(), abs=1e-6)
        assert row["ratio"] == pytest.approx(ours.mean() / theirs.mean(), abs=1e-6)
        changed = (ours - theirs)[5:]
        assert row["helped"] == pytest.approx((changed > 0).sum() / 60, abs=1e-6)
        assert row["hurt"] == pytest.approx((changed < 0).sum() / 60, abs=1e-6)
        assert row["randomisation_p_value"] == pytest.approx(raw[-1], abs=0.02)
    # Holm by hand: the smallest of three times 3, the next times 2, none below the one before.
    order = np.argsort(raw)
    expected = [raw[order[0]] * 3, raw[order[1]] * 2, raw[order[2]]]
    expected = np.minimum(np.maximum.accumulate(expected), 1)
    assert [rows[i]["p_value_holm"] for i in order] == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_cell_says_what_its_run_says(smoke, cell, tmp_path):
    workdir, _ = smoke
    results = json.loads((workdir / "results.json").read_text())
    path = tmp_path / "a.json.gz"
    write_cell(path, cell)
    before = path.read_bytes()
    write_cell(path, read_cell(path))
    assert path.read_bytes() == before
    # Whoever has the standard library alone comes to the means of results.json.
    record = json.loads(gzip.decompress(before))
    for row in results["rows"]:
        for metric in METRICS:
            values = record["values"][row["system"]][metric]
            assert sum(values) / len(values) == pytest.approx(row[metric], abs=2e-6)
    assert str(pathlib.Path.cwd()) not in json.dumps(record)  # Nobody else has these places.
    # Tokens a query: of the passages that dev chose to use, as the journal has them.
    used = results["chosen"]["expandr"]["samples"]
    journal = (workdir / "work" / "evaluation-trained.jsonl").read_text().splitlines()
    tokens = [
        row["tokens"] for row in map(json.loads, journal)
        if row["query_id"] in cell.queries and row["sample"] < used
    ]  # fmt: skip
    assert len(tokens) == used * len(cell.queries)
    costs = cell.costs["expandr"]
    assert costs["tokens_per_query"] == pytest.approx(sum(tokens) / len(cell.queries), abs=1e-6)
    assert costs["seconds_per_query"] > cell.costs["bm25"]["seconds_per_query"] > 0
    assert cell.costs["expandr-plain"]["tokens_per_query"] == 0
    assert cell.writer == "trained generator"


def test_the_table_of_packed_cells(packed, config, tmp_path):
    out = tmp_path / "out"
    arguments = [f"--config={config}", f"--cells={packed}", "--seeds=0,1", f"--workdir={out}"]
    printed = finish(command("eval.table", *arguments, f"--pack={tmp_path / 'again'}"))
    assert not (out / "cells").exists()  # Nothing was run.
    results = json.loads((out / "results.json").read_text())
    cells = {}
    for path in packed.iterdir():
        record = json.loads(gzip.decompress(path.read_bytes()))
        cells[record["collection"], record["seed"]] = record
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    systems = list(cells["toy", 0]["values"])
    assert len(results["rows"]) == 2 * len(systems) * len(METRICS)
    for row in results["rows"]:
        values = [
            cells[row["collection"], s]["values"][row["system"]][row["metric"]] for s in (0, 1)
        ]
        assert row["seeds"] == pytest.approx(np.mean(values, axis=1), abs=1e-6)
        assert row["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert row["low"] < row["mean"] < row["high"]
    for row in results["tests"]:
        ours, theirs = (
            np.mean([cells[row["collection"], s]["values"][row[k]]["ndcg@10"] for s in (0, 1)], 0)
            for k in ("system", "baseline")
        )
        assert row["p_value"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-4)
        assert row["p_value"] <= row["p_value_holm"] <= 2 * row["p_value"]
    pairs = {(row["system"], row["baseline"]) for row in results["tests"]}
    assert {("expandr", "fine-tuned"), ("zero-shot+expansion", "zero-shot")} <= pairs
    assert {row["system"] for row in results["costs"]} == set(systems)
    assert [row["seed"] for row in results["cells"]] == [0, 1, 0, 1]
    lines = list(csv.reader((out / "results.csv").open()))
    assert lines[0][:4] == ["collection", "system", "metric", "mean"]
    assert [float(line[3]) for line in lines[1:]] == [row["mean"] for row in results["rows"]]
    first = f"{results['rows'][0]['mean']:.4f} ["
    page = (out / "results.html").read_text()
    for text in (printed, page, *((out / f"results.{s}").read_text() for s in ("md", "tex"))):
        assert first in text
    # It needs nothing else.
    assert not re.search(r"<script|src=|url\((?!#)|href=\"(?!#|data:)", page)
    assert page.count('<section id="toy">') == 1
    assert "helped most against fine-tuned" in page


def test_packed_cells_hold_no_texts_where_these_are_not_asked_for(packed, config, tmp_path):
    arguments = [f"--config={config}", "--seeds=0,1", f"--workdir={tmp_path / 'out'}"]
    bare = tmp_path / "bare"
    finish(command("eval.table", *arguments, f"--cells={packed}", f"--pack={bare}", "--notexts"))
    for path in packed.iterdir():
        told, kept = (json.loads(gzip.decompress((of / path.name).read_bytes()))
                      for of in (bare, packed))  # fmt: skip
        left_out = ("texts", "expansions", "writer")
        assert [any(kept.pop(name)) for name in left_out] == [True] * 3
        assert [any(told.pop(name)) for name in left_out] == [False] * 3
        assert told == kept
    again = tmp_path / "again"
    finish(command("eval.table", f"--config={config}", "--seeds=0,1", f"--workdir={again}",
                   f"--cells={bare}"))  # fmt: skip
    for name in ("results.csv", "results.md"):
        assert (again / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_cells_of_other_settings_or_code_are_named(packed, config, tmp_path, monkeypatch):
    given = table.given_cells([packed])

    def wanted(**overrides):
        return table.wanted_cells(config, overrides, ["pydoc", "/elsewhere/toy"], [0, 1], tmp_path)

    said = []
    assert len(table.check_given(wanted(), given, said.append)) == 4
    assert not said
    with pytest.raises(UserError, match=r"pydoc-seed-0.*rounds is 1, in .*tiny\.py.* 2; .*toy-s"):
        table.check_given(wanted(rounds=2), given, said.append)
    monkeypatch.setattr(table, "revision", lambda: "another")
    table.check_given(wanted(), given, said.append)
    assert "this is another" in said[0]


def test_a_name_of_a_public_archive_is_the_same_cell_as_a_directory_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(pathlib.Path(table.__file__).parents[1] / "configs" / "table.py")
    (by_name,) = table.wanted_cells(file, {}, ["scifact"], [0], tmp_path)
    assert by_name.path == ""
    read = read_config(config_of(by_name.file, {}))
    assert read.data.url.endswith("/scifact.zip")
    assert read.data.md5 == public.MD5["scifact"]
    (by_path,) = table.wanted_cells(file, {}, ["elsewhere/scifact"], [0], tmp_path)
    (tmp_path / "scifact").mkdir()
    (there,) = table.wanted_cells(file, {}, ["scifact"], [0], tmp_path)
    assert (by_path.path, there.path) == ("elsewhere/scifact", "scifact")
    assert by_name.config == by_path.config == there.config
    assert by_name.name == by_path.name


@pytest.mark.parametrize("name", ["arguana", "entailmentbank", "scifact"])
def test_a_collection_in_the_working_directory_has_its_name(name, tmp_path, monkeypatch):
    """And what the configs know of it by that."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    file = str(pathlib.Path(table.__file__).parents[1] / "configs" / "table.py")
    here, named = (
        table.wanted_cells(file, {}, [path], [0], tmp_path)[0]
        for path in (".", f"elsewhere/{name}")
    )
    assert here.collection == name
    assert here.config == named.config


def test_a_finished_run_is_not_started_again(smoke, config, tmp_path, monkeypatch):
    (wanted,) = table.wanted_cells(config, {}, ["pydoc"], [0], tmp_path)
    wanted.directory.parent.mkdir(parents=True)
    shutil.copytree(
        smoke[0], wanted.directory, ignore=shutil.ignore_patterns("checkpoints", "work")
    )
    monkeypatch.setattr(table, "make_cell", None)
    (found,), failed = table.make_table([wanted], {}, QUIET)
    assert not failed
    shutil.rmtree(wanted.directory)  # What the table needs is packed.
    (again,), _ = table.make_table([wanted], {}, QUIET)
    assert again == found
    assert measured([again])[0].queries == found.queries
    others = table.wanted_cells(config, {}, ["pydoc", "/nowhere/toy"], [0], tmp_path)
    with pytest.raises(UserError, match="/nowhere/toy"):
        table.make_table(others, {}, QUIET)


def test_a_cell_that_fails_is_a_line_and_the_others_go_on(packed, config, tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(table, "PROGRAM", "fake")
    wanted = table.wanted_cells(config, {}, ["pydoc"], [0, 1, 2], tmp_path)
    given = {key: cell for key, (_, cell) in table.given_cells([packed]).items()}
    said = []
    reporter = dataclasses.replace(QUIET)
    monkeypatch.setattr(type(reporter), "say", lambda _, text: said.append(text))
    cells, failed = table.make_table(wanted, given, reporter)
    assert [cell.seed for cell in cells] == [0, 1]
    assert [one.seed for one in failed] == [2]
    (line,) = [text for text in said if "failed" in text]
    assert f"exit status 2: error: the disk of --config={config}:pydoc is full" in line
    assert str(wanted[2].log) in line


def test_mistakes_get_one_line(config, tmp_path):
    process = command("eval.table", f"--config={config}", f"--workdir={tmp_path}")
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert printed.startswith("error: --data is missing")
    assert len(printed.splitlines()) == 1
    for texts in (["0", "x"], ["1", "1"], ["-1"], []):
        with pytest.raises(UserError, match=rf"--seeds={','.join(texts)}: expected different"):
            table.read_seeds(texts)
    for file, overrides, data, message in (
        ("configs/quickstart.py", {}, ["pydoc"], r"quickstart\.py:pydoc: .* takes nothing after"),
        (f"{config}:pydoc", {}, ["pydoc"], "expected a file alone"),
        (config, {"seed": 1}, ["pydoc"], "expected --seeds"),
        (config, {"roundz": 1}, ["pydoc"], "there is no setting 'roundz'"),
        (config, {"rounds": 0}, ["pydoc"], "rounds"),
        (config, {}, ["a/toy", "b/toy"], "two collections are called 'toy'"),
        (config, {"data.tests": "('/x/b',)"}, ["/x/a", "/x/a-to-b"], "are called 'a-to-b'"),
    ):
        with pytest.raises(UserError, match=message):
            table.wanted_cells(file, overrides, data, [0], tmp_path)
    with pytest.raises(UserError, match="holds no NAME-seed-S"):
        table.given_cells([tmp_path])


@pytest.mark.slow
def test_a_table_that_was_killed_goes_on(smoke, config, tmp_path):
    for name in ("toy", "broken"):
        shutil.copytree(smoke[0] / "data", tmp_path / name)
    (tmp_path / "broken" / "qrels" / "train.tsv").unlink()
    out = tmp_path / "out"
    data = f"--data={tmp_path / 'broken'},{tmp_path / 'toy'}"
    arguments = [f"--config={config}", data, "--seeds=3", f"--workdir={out}"]
    process = command("eval.table", *arguments)
    cell = out / "cells" / "toy" / "seed-3"
    until([process], (cell / "round-0" / "expansions.jsonl").exists)
    process.kill()
    process.communicate()
    # Its run goes on by itself, and is waited for.
    process = command("eval.table", *arguments)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "toy, seed 3: another process is making it; waiting for that" in printed
    assert "broken, seed 3: failed, exit status 2: error:" in printed
    assert error_of(printed).startswith("error: 1 of 2 cells failed: broken, seed 3 (log: ")
    table_ = json.loads((out / "results.json").read_text())
    results = json.loads((cell / "results.json").read_text())
    of_toy = [row for row in table_["rows"] if row["metric"] == "map"]
    assert [(row["collection"], row["system"], row["mean"]) for row in of_toy] == [
        ("toy", row["system"], row["map"]) for row in results["rows"]
    ]
    assert table_["missing"] == ["broken, seed 3"]
    before = (cell.with_suffix(".log")).read_text()
    shutil.copy(smoke[0] / "data" / "qrels" / "train.tsv", tmp_path / "broken" / "qrels")
    shutil.rmtree(cell)
    printed = finish(command("eval.table", *arguments))
    assert (cell.with_suffix(".log")).read_text() == before
    assert json.loads((out / "results.json").read_text())["missing"] == []
