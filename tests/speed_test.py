"""eval.speed: what it makes of two sides' rates, and what it does not measure."""

import io
import json
import re

import pytest
from rich.console import Console

from eval.benchmarks import NAMES
from eval.benchmarks.process import benchmark
from eval.speed import measure, speed_table
from tests.commands import ROOT, command

CONTRACT = {
    "name", "unit", "ours", "peer", "peer_name", "ratio", "peak_memory_ours", "peak_memory_peer",
}  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """(what was measured of two rows that fail and of two that do not, what was printed of it)."""
    output = io.StringIO()
    names = ["tests.toy_benchmark_wrong", "tests.toy_benchmark"]
    result = measure(names, 3, Console(file=output, width=300))
    Console(file=output, width=300).print(speed_table(result))
    return result, output.getvalue()


def test_medians_ratio_and_limits_of_a_row_and_a_peer_that_is_not_installed(measured):
    result, output = measured
    *_, good, absent = result["rows"]
    assert good.keys() >= CONTRACT
    assert absent.keys() >= CONTRACT
    assert (good["ours"], good["peer"], good["ratio"]) == (20.0, 5.0, 4.0)
    assert good["each_ours"] == [30.0, 10.0, 20.0]
    assert good["checked"] == "values equal to 0.0001"
    assert good["peer_name"].startswith("numpy 2.")
    assert (good["setting_ours"], good["setting_peer"]) == ("as set", "its best")
    assert 1e7 < good["peak_memory_ours"] < 2e9
    machine = result["machine"]
    assert good["share_ours"] == pytest.approx(20.0 * 2e6 / machine["matmul_flops"])
    bound = min(machine["matmul_flops"] / 2e6, machine["read_bytes"] / 4e6)
    assert good["floor"] == pytest.approx(bound)
    assert (absent["ours"], absent["peer"], absent["ratio"]) == (7.0, None, None)
    assert absent["peak_memory_peer"] is None
    assert absent["reason"] == "not installed: no-such-distribution"
    json.dumps(result, allow_nan=False)
    # They take turns.
    lines = [line for line in output.splitlines() if line.startswith("good: ")]
    turns = [line.split(", ")[1].split(":")[0] for line in lines if "/3, " in line]
    assert turns == ["ours", "peer", "peer", "ours", "ours", "peer"]
    assert "not installed" in output


def test_another_checkout_is_the_peer(tmp_path, monkeypatch):
    """The same benchmark, where it does a third of the work in the time; no peer is tuned then."""
    monkeypatch.setenv("TOY_UNTUNED", "1")
    for path in ("eval", "expandr_jax", "train"):
        (tmp_path / path).symlink_to(ROOT / path)
    (tmp_path / "tests").mkdir()
    toy = (ROOT / "tests" / "toy_benchmark.py").read_text()
    (tmp_path / "tests" / "toy_benchmark.py").write_text(toy.replace("30.0", "7.5"))
    console = Console(file=io.StringIO())
    good, absent = measure(["tests.toy_benchmark"], 1, console, tmp_path)["rows"]
    assert (good["ours"], good["peer"], good["ratio"]) == (30.0, 7.5, 4.0)
    assert (absent["ours"], absent["peer"], absent["ratio"]) == (7.0, 7.0, 1.0)
    assert good["peer_name"] == str(tmp_path)


def test_what_is_no_checkout_is_named(tmp_path):
    program = command("eval.speed", f"--against={tmp_path}", f"--out={tmp_path / 'speed.json'}")
    output, _ = program.communicate(timeout=120)
    assert program.returncode == 2
    assert output.strip() == f"error: --against={tmp_path}: not a checkout of this project"


def test_sides_that_differ_or_fail_are_not_measured_and_leave_the_others(measured):
    result, output = measured
    different, failing, good, _ = result["rows"]
    assert re.search(
        r"numpy [\d.]+ came to something else: values differ by 0\.5", different["failed"]
    )
    assert re.search(r"peer: failed: .*RuntimeError: no such thing", failing["failed"])
    for row in (different, failing):
        assert row.keys() >= CONTRACT
        assert row["ours"] is row["ratio"] is None
    assert good["ratio"] > 0
    assert output.count("(failed)") == 2


def test_a_benchmark_that_is_not_there_is_named(tmp_path):
    program = command("eval.speed", "--only=sleeping", f"--out={tmp_path / 'speed.json'}")
    output, _ = program.communicate(timeout=120)
    assert program.returncode == 2
    assert output.strip() == f"error: --only=sleeping: expected some of {', '.join(NAMES)}"
    assert not any(tmp_path.iterdir())


def test_every_benchmark_can_be_loaded_without_its_peer():
    for name in NAMES:
        for row in benchmark(name).ROWS:
            assert row.unit.endswith("/s")
            assert row.peer_name
