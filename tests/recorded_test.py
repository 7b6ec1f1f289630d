"""Runs that an older version recorded: the present one goes on with them, and comes to the same.

tests/recorded/ has smoke-stopped.tar.xz, a workdir of configs/smoke.py that commit 4e30eda made and
that SIGTERM stopped in step B, after 5 of its 8 updates, and results.json of a whole run. Later
versions must read both.
"""

import json
import pathlib
import tarfile

import pytest

from tests.commands import command, finish, start

RECORDED = pathlib.Path(__file__).parent / "recorded"
STOPPED = RECORDED / "smoke-stopped.tar.xz"
# As it was recorded, from the repository's root.
MODELS = [
    "--config.retriever.source=configs/tiny/tiny-bert",
    "--config.generator.source=configs/tiny/tiny-llama",
]


def same(found, expected):
    """Whether two results are the same, numbers to 1e-6."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, abs=1e-6)
    return found == expected


def results(workdir):
    return json.loads((workdir / "results.json").read_text())


def test_a_run_comes_to_what_the_recorded_one_came_to(smoke):
    workdir, _ = smoke
    assert same(results(workdir), results(RECORDED))


def test_a_recorded_run_goes_on_where_it_was_stopped(tmp_path):
    with tarfile.open(STOPPED) as archive:
        # Python before 3.11.4, which some systems have, knows no filters.
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path, **safely)
    workdir = tmp_path / "smoke-stopped"
    before = (workdir / "metrics.jsonl").read_text()
    config = (workdir / "config.json").read_text()
    kept = {path: path.read_bytes() for path in (workdir / "round-0").iterdir()}
    printed = finish(start(workdir, *MODELS))
    after = (workdir / "metrics.jsonl").read_text()
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    assert [(row["phase"], row["step"]) for row in rows] == [("generator", i) for i in (5, 6, 7)]
    assert {path: path.read_bytes() for path in kept} == kept
    assert "made again" not in printed
    assert same(results(workdir), results(RECORDED))
    assert (workdir / "config.json").read_text() == config
    query = "clip gradients by their global norm"
    printed = finish(command("eval.search", f"--workdir={workdir}", query))
    assert "query + expansion" in printed
