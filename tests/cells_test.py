"""Cells that are damaged or contradict themselves, and runs that are: refused, or made again."""

import dataclasses
import json
import shutil

import pytest

from eval import table
from eval.cells import _costs, read_cell
from expandr_jax.errors import UserError
from expandr_jax.ranking.gate_features import BEFORE
from expandr_jax.ranking.systems import parse_system
from expandr_jax.runtime.progress import QUIET
from tests.table_test import cell, config  # noqa: F401


def move(values):
    """Makes them values with the same mean, of which one is no share of 1."""
    values[0] += 2
    values[1] -= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["values"]["bm25"]["map"].__setitem__(0, 0.123), "bm25 has map .* in results"),
        (lambda r: r["values"]["bm25"]["map"].pop(), "not a number from 0 to 1"),
        (lambda r: r["values"].pop("bm25"), "other systems"),
        (lambda r: r.pop("queries"), "not a cell of a table"),
        (lambda r: r.update(format=99), "it has format 99"),
        (lambda r: r.update(seed="0"), "not a cell of a table"),
        (lambda r: r.update(seed=7), "its seed is 7, and in its config 0"),
        (lambda r: r.update(collection="../x"), "its collection is called '../x'"),
        (lambda r: r["values"]["bm25"]["map"].__setitem__(0, 10**400), "not a number from 0 to 1"),
        (lambda r: r["values"]["bm25"]["map"].__setitem__(0, "0.5"), "not a number from 0 to 1"),
        (lambda r: move(r["values"]["bm25"]["map"]), "not a number from 0 to 1"),
        (lambda r: r["results"]["rows"][0].update(map=float("nan")), "bm25 has map nan"),
        (lambda r: r["results"]["rows"].append(r["results"]["rows"][0]), "two rows of bm25"),
        (lambda r: r["costs"]["bm25"].update(seconds_per_query=float("nan")), "costs of bm25 are"),
        (lambda r: r["costs"]["bm25"].pop("seconds_per_query"), "costs of bm25 are"),
        (lambda r: r["timings"].update(total_seconds="x"), "its timings have total_seconds 'x'"),
        (lambda r: r["timings"]["phases"][0].pop("seconds"), "not a cell of a table"),
        (lambda r: r["texts"].__setitem__(0, None), "a query, or its text or exp"),
    ],
)
def test_cells_that_do_not_fit_together_are_refused(cell, change, message, tmp_path):  # noqa: F811
    record = json.loads(json.dumps(dataclasses.asdict(cell)))
    change(record)
    path = tmp_path / "pydoc-seed-0.json"
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"pydoc-seed-0\.json: .*{message}"):
        read_cell(path)


def test_a_damaged_run_goes_on_and_ends_no_table(smoke, config, tmp_path, monkeypatch):  # noqa: F811
    """It is train.joint that sees what is damaged, and makes it again."""
    (wanted,) = table.wanted_cells(config, {}, ["pydoc"], [0], tmp_path)
    wanted.directory.parent.mkdir(parents=True)
    shutil.copytree(smoke[0], wanted.directory, ignore=shutil.ignore_patterns("checkpoints"))
    begun, said = [], []
    monkeypatch.setattr(table, "make_cell", lambda one, _: begun.append(one))
    reporter = dataclasses.replace(QUIET)
    monkeypatch.setattr(type(reporter), "say", lambda _, text: said.append(text))
    path = wanted.directory / "evaluation" / "tokens.jsonl"
    whole = path.read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]))  # Its costs would be others.
    assert table.make_table([wanted], {}, reporter) == ([], [wanted])
    assert begun == [wanted]
    assert any("pydoc, seed 0: " in text and "tokens.jsonl: is damaged" in text for text in said)
    assert not wanted.packed.exists()
    path.write_text(whole)
    (found,), _ = table.make_table([wanted], {}, reporter)
    packed = wanted.packed.read_bytes()
    wanted.packed.write_bytes(packed[:-9])
    assert table.make_table([wanted], {}, reporter) == ([found], [])  # Of the run, which is there.
    assert wanted.packed.read_bytes() == packed
    wanted.packed.write_bytes(packed[:-9])
    shutil.rmtree(wanted.directory)
    with pytest.raises(UserError, match="not a cell of a table"):
        table.make_table([wanted], {}, reporter)
    assert begun == [wanted]


def test_texts_that_two_rows_share_cost_what_the_one_that_uses_more_does():
    """By hand: a gate spares its own leaf alone, and samples that are not used are not counted."""
    leaves = ("bm25+expansion", "expandr")
    samples = [("a", 3), ("a", 5), ("b", 7), ("b", 11)]
    generated = {
        leaf: [{"query_id": query, "split": "test", "tokens": n} for query, n in samples]
        for leaf in leaves
    }
    fused = [f"interpolation:bm25+expansion:{name}" for name in ("expandr", "expandr-gated")]
    names = (*leaves, "expandr-gated", *fused)
    parts = {part.name for name in names for part in parse_system(name).with_parts()}
    timings = {
        "phases": [{"phase": "expansions for evaluation, trained generator", "seconds": 52.0}],
        "searches": [{"system": part, "seconds": 0.0, "queries": 2} for part in parts],
    }
    chosen = {"bm25+expansion": {"samples": 2}, "expandr": {"samples": 1}}
    costs = _costs(names, {"chosen": chosen}, timings, generated, {BEFORE: {"b"}}, 2)
    tokens = {"bm25+expansion": 13, "expandr": 5, "expandr-gated": 3.5, **dict.fromkeys(fused, 13)}
    assert {name: of["tokens_per_query"] for name, of in costs.items()} == tokens
    assert {name: of["seconds_per_query"] for name, of in costs.items()} == {
        name: 2 * count for name, count in tokens.items()
    }
