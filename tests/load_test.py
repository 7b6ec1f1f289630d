"""`eval.load` prints what it measures of a service; the numbers of a tiny run mean nothing."""

import json
import shutil

import pytest

from tests.commands import command, finish


@pytest.mark.slow
def test_it_measures_a_service(smoke, tmp_path):
    run, out = tmp_path / "run", tmp_path / "load.json"
    shutil.copytree(smoke[0], run)
    shutil.copytree(run / "export" / "retriever", run / "export" / "query-encoder")
    arguments = ["--clients=1,4", "--seconds=0.5", "--soak=100", "--writes=300", "--nopeer"]
    printed = finish(command("eval.load", f"--workdir={run}", *arguments, f"--out={out}"))
    results = json.loads(out.read_text())
    rows = {(row["mode"], row["clients"]): row for row in results["rows"]}
    for mode in ("plain", "distilled", "expanded, kept"):
        for clients in (1, 4):
            row = rows[mode, clients]
            assert row["errors"] == 0
            assert 0 < row["p50_ms"] <= row["p99_ms"]
            assert row["queries_per_second"] > 0
            assert row["peer_p50_ms"] is None
    assert rows["expanded, written", 1]["sampler_p50_ms"] > 0
    assert 0 < results["start"]["plain"] <= results["start"]["expanded"]
    assert results["soak"]["requests"] == 100
    assert (results["writes"]["added"], results["writes"]["failed_searches"]) == (300, 0)
    assert "kept" in printed  # A cell of two lines, where a terminal is narrow.
