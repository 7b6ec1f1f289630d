"""A run's own bookkeeping."""

import datetime
import io
import json
import time

import jax
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.runtime.run import Run


def test_time_within_an_inner_phase_counts_once(tmp_path):
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(file=io.StringIO()))
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
    # What is written lags what passed by the writing of the last row.
    assert 0.4 <= timings["total_seconds"] <= whole + 0.002  # It is rounded.
    assert timings["total_seconds"] == pytest.approx(sum(seconds.values()), abs=0.002)
    assert {(row["device"], row["jax"]) for row in timings["phases"]} == {("cpu", jax.__version__)}
    run.close()


def test_a_run_without_its_config_is_refused(tmp_path):
    config, console = read_config(smoke.get_config()), Console(file=io.StringIO())
    run = Run(tmp_path / "run", config, console)
    run.path("config.json").unlink()
    run.close()
    run = Run(tmp_path / "run", config, console)  # Nothing is there yet that depends on it.
    run.checksums.record()
    run.path("config.json").unlink()
    run.close()
    with pytest.raises(UserError, match=r"config.json: is gone.*use a new --workdir"):
        Run(tmp_path / "run", config, console)


def test_another_config_may_follow_one_that_wrote_nothing(tmp_path):
    console = Console(file=io.StringIO())
    mistyped, right, other = (
        with_settings(read_config(smoke.get_config()), {"data.path": path})
        for path in ("mistyped", "right", "other")
    )
    Run(tmp_path / "run", mistyped, console).close()
    run = Run(tmp_path / "run", right, console)
    assert json.loads(run.path("config.json").read_text())["config"]["data"]["path"] == "right"
    run.path("data").mkdir()
    run.close()
    with pytest.raises(UserError, match=r"another config \(data.path was 'right', now 'other'\)"):
        Run(tmp_path / "run", other, console)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data/mine.txt", "holds data, which a run would write over"),
        ("export/retriever/mine.txt", "holds export, which a run would write over"),
        ("results.json", "holds results.json, which a run would write over"),
        ("config.json", "config.json: is damaged"),  # A model's, perhaps.
        ("notes.txt", None),
        ("data/", None),
    ],
)
def test_files_that_are_no_runs_are_kept(tmp_path, name, message):
    file = tmp_path / "run" / name
    if name.endswith("/"):
        file.mkdir(parents=True)
    else:
        file.parent.mkdir(parents=True)
        file.write_text("{}")
    config, console = read_config(smoke.get_config()), Console(file=io.StringIO())
    if message is None:
        Run(tmp_path / "run", config, console).close()
    else:
        with pytest.raises(UserError, match=message):
            Run(tmp_path / "run", config, console)
    assert file.is_dir() or file.read_text() == "{}"


@pytest.mark.parametrize("setting", ["data.path", "retriever.source", "data.tests"])
def test_what_is_read_from_where_the_run_writes_is_refused(tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    inside = "run/x/../data/mine"
    value = (inside,) if setting == "data.tests" else inside
    config = with_settings(read_config(smoke.get_config()), {setting: value})
    with pytest.raises(UserError, match=f"{setting} is {inside}, where a run in this workdir"):
        Run("run", config, Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff", b"[]", b"{}", b'{"phases": 3}', b'{"phases": [{}]}',
        b'{"phases": [{"phase": "one", "seconds": "x", "peak_memory_bytes": 1}]}',
        b'{"phases": [{"phase": "one", "second": 1e6, "peak_memory_bytes": 1}]}',
        b'{"phases": [{"phase": [], "seconds": 1e6, "peak_memory_bytes": 1}]}',
    ],
)  # fmt: skip
def test_damaged_timings_are_counted_anew(tmp_path, content):
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(file=io.StringIO()))
    run.path("timings.json").write_bytes(content)
    for _ in range(2):
        with run.phase("one"):
            pass
    (row,) = json.loads(run.path("timings.json").read_text())["phases"]
    assert row["phase"] == "one"
    assert row["seconds"] < 1000  # None of what was there.
    run.close()


def test_prompts_are_told_what_they_were_told_at_the_first_start(tmp_path):
    config, console = read_config(smoke.get_config()), Console(file=io.StringIO())
    run = Run(tmp_path / "run", config, console)
    path = run.path("config.json")
    record = json.loads(path.read_text())
    assert run.config.generator.today == record["config"]["generator"]["today"]
    assert datetime.date.fromisoformat(run.config.generator.today)
    assert run.config.generator.thinking is False
    run.path("data").mkdir()
    run.close()

    def reopened(**chats):
        generator = {k: v for k, v in record["config"]["generator"].items() if k not in chats}
        given = {k: v for k, v in chats.items() if v is not None}
        changed = {**record["config"], "generator": {**generator, **given}}
        path.write_text(json.dumps({**record, "config": changed}))
        run = Run(tmp_path / "run", config, console)
        run.close()
        return run.config.generator

    assert reopened(today="2020-01-02").chat["today"] == datetime.date(2020, 1, 2)
    older = reopened(today=None, thinking=None)  # They said neither.
    assert (older.today, older.thinking) == ("", None)
    with pytest.raises(UserError, match=r"\(generator.thinking was True, now False\)"):
        reopened(thinking=True)
