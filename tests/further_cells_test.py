"""Cells of a table for the collections that a run is tested on beside its own."""

import json
import shutil

import pytest

from eval import table
from eval.cells import measured, write_cell
from expandr_jax import metrics
from expandr_jax.data.beir import read_qrels
from expandr_jax.errors import UserError
from expandr_jax.metrics import METRICS
from expandr_jax.runtime.progress import QUIET
from tests.table_test import config  # noqa: F401


def test_further_collections_of_a_run_are_cells_of_their_own(smoke, config, tmp_path, monkeypatch):  # noqa: F811
    """As a run leaves them in tests/NAME; the collection itself may be gone."""
    overrides = {"data.tests": "('/gone/other.zip',)"}
    own, other = wanted = table.wanted_cells(config, overrides, ["pydoc"], [0], tmp_path)
    assert (other.collection, other.test) == ("pydoc-to-other", "other")
    assert (own.directory, own.command) == (other.directory, other.command)
    shutil.copytree(smoke[0], own.directory, ignore=shutil.ignore_patterns("checkpoints", "work"))
    record = json.loads((own.directory / "config.json").read_text())
    record["config"]["data"]["tests"] = ["/gone/other.zip"]
    (own.directory / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(table, "make_cell", lambda *_: None)
    (found,), failed = table.make_table(wanted, {}, QUIET)  # It has not been tested there yet.
    assert (found.collection, failed) == ("pydoc", [other])
    place = own.directory / "tests" / "other"
    place.mkdir(parents=True)
    for name in ("results.json", "qrels.trec", "runs", "evaluation"):
        path = own.directory / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, place / name)
    run = metrics.read_trec(place / "runs" / "bm25.trec")
    query = sorted(run)[0]
    run[query] = {}
    metrics.write_trec(place / "runs" / "bm25.trec", run, "bm25")
    qrels = read_qrels(place / "qrels.trec")
    results = json.loads((place / "results.json").read_text())
    for row in results["rows"]:
        if row["system"] == "bm25":
            row |= {m: round(metrics.mean(of), 6)
                    for m, of in metrics.evaluate(run, qrels, METRICS).items()}  # fmt: skip
    (place / "results.json").write_text(json.dumps(results))
    cells, failed = table.make_table(wanted, {}, QUIET)
    assert not failed
    assert [cell.collection for cell in cells] == ["pydoc", "pydoc-to-other"]
    assert cells[0] == found
    assert cells[1].values["expandr"] == cells[0].values["expandr"]
    at = cells[1].queries.index(query)
    assert cells[1].values["bm25"]["recall@100"][at] == 0
    assert cells[1].texts == cells[0].texts
    assert {*cells[1].costs["expandr"].values()} == {None}  # Nobody took the time of it.
    assert [one.name for one in measured(cells)] == ["pydoc", "pydoc-to-other"]
    for one in cells:
        write_cell(tmp_path / "packed" / f"{one.name}.json.gz", one)
    with pytest.raises(UserError, match="expected at most 99: take fewer test queries"):
        write_cell(tmp_path / "packed" / "small.json.gz", cells[1], most=99)
    given = table.given_cells([tmp_path / "packed"])
    assert table.collections_of(given) == ["pydoc"]
    assert len(table.check_given(wanted, given, print)) == 2
