"""A run's own bookkeeping."""

import io
import json
import time

import pytest
from rich.console import Console

from configs import smoke
from train.run import Run


def test_time_within_an_inner_phase_counts_once(tmp_path):
    run = Run(tmp_path / "run", smoke.get_config(), Console(file=io.StringIO()))
    start = time.perf_counter()
    with run.phase("outer"):
        with run.phase("inner"):
            time.sleep(0.2)
        with run.phase("inner"):
            time.sleep(0.2)
    whole = time.perf_counter() - start
    timings = json.loads(run.path("timings.json").read_text())
    seconds = {row["phase"]: row["seconds"] for row in timings["phases"]}
    assert seconds["inner"] >= 0.4
    # What is written lags what passed only by the writing of the last row.
    assert timings["total_seconds"] == pytest.approx(whole, abs=0.1)
    assert timings["total_seconds"] == pytest.approx(sum(seconds.values()), abs=0.002)
    run.close()
