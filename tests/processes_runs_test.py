"""Runs of several processes: what they come to beside one, and how they end."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from expandr_jax.runtime.processes import EXIT_LOST, SECONDS_TO_STOP
from tests.commands import (
    ROOT,
    SPREAD,
    ended,
    error_of,
    finish,
    free_port,
    start,
    start_processes,
    step_metrics,
    until,
)


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """The smoke run by two processes, each of which holds half of every parameter in training.

    (workdir, what each printed, names of the files of the second one's shares)
    """
    workdir = tmp_path_factory.mktemp("divided") / "run"
    processes = start_processes(workdir, 2, *SPREAD)
    seen = set()
    while any(process.poll() is None for process in processes):
        seen |= {re.sub(r"\.part$", "", p.name) for p in workdir.glob("work/**/*.process-1*")}
        time.sleep(0.02)
    output = [finish(process) for process in processes]
    return workdir, output, seen


@pytest.mark.slow
def test_two_processes_divide_the_work_and_one_speaks(divided):
    workdir, (first, second), seen = divided
    assert f"report: {workdir / 'report.html'}" in first
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []
    assert json.loads((workdir / "config.json").read_text())["device"]["count"] == 2
    # Shares of texts are there for a moment only, and a busy machine may look away; vectors stay
    # while others are encoded. That a journal is shared out is tested above.
    assert any(".npy.process-1" in name for name in seen), seen
    assert not list(workdir.glob("work/**/*process-*"))
    share = json.loads((workdir / "data" / "SOURCE.json").read_text())["generator_train"]
    assert len(share) == 8


@pytest.mark.slow
def test_two_processes_lose_and_reward_as_one(divided, smoke):
    ours, theirs = step_metrics(divided[0]), step_metrics(smoke[0])
    assert len(ours) == len(theirs) > 20
    for one, other in zip(ours, theirs, strict=True):
        # Norms of gradients are up to 100 times as large as losses.
        norms = one.pop("grad_norm", 0.0), other.pop("grad_norm", 0.0)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
        assert one == pytest.approx(other, abs=1e-5)
    for name in ("candidates.jsonl", "preferences.jsonl"):
        found, expected = (rows(w / "round-0" / name) for w in (divided[0], smoke[0]))
        for one, other in zip(found, expected, strict=True):
            candidates, others = one.pop("candidates", []), other.pop("candidates", [])
            assert one == pytest.approx(other, abs=1e-5)
            for candidate, like in zip(candidates, others, strict=True):
                assert candidate.pop("reward_terms") == pytest.approx(like.pop("reward_terms"))
                assert candidate == pytest.approx(like, abs=1e-5)


@pytest.mark.slow
def test_two_processes_say_what_one_says(divided, smoke):
    """Texts are equal, but for one that differs from the first draw near a boundary on."""
    journals = sorted(p.relative_to(smoke[0]) for p in smoke[0].glob("work/**/*.jsonl"))
    texts = [p for p in journals if "finished" in rows(smoke[0] / p)[0]]
    assert len(texts) >= 5
    total = 0
    for path in texts:
        found, expected = (
            {(row["query_id"], row["sample"]): row for row in rows(workdir / path)}
            for workdir in (divided[0], smoke[0])
        )
        assert list(found) == list(expected)
        total += len(found)
        for name, row in expected.items():
            assert found[name]["text"] == row["text"] or row["near_ties"], (path, name)
    assert total > 150


@pytest.mark.slow
def test_two_processes_rank_as_one(divided, smoke):
    found = sorted((divided[0] / "runs").iterdir())
    assert [p.name for p in found] == sorted(p.name for p in (smoke[0] / "runs").iterdir())
    for path in found:
        lists = [
            [line.split() for line in (w / "runs" / path.name).read_text().splitlines()]
            for w in (divided[0], smoke[0])
        ]
        ours, theirs = (np.array([float(line[4]) for line in lines]) for lines in lists)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)
        documents = [[(line[0], line[2]) for line in lines] for lines in lists]
        assert documents[0] == documents[1], path.name
    results = (json.loads((w / "results.json").read_text()) for w in (divided[0], smoke[0]))
    ours, theirs = results
    assert ours["chosen"] == theirs["chosen"]
    assert ours["rows"] == theirs["rows"]


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is_by_one_and_by_two(divided):
    workdir = divided[0]
    before = (workdir / "results.json").stat().st_mtime_ns
    for process in start_processes(workdir, 2, *SPREAD):
        finish(process)
    assert "expandr-plain" in finish(start(workdir))
    assert (workdir / "results.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    "under_way",
    ["config.json", pytest.param("checkpoints/fine-tuned/[0-9]*", marks=pytest.mark.slow)],
)
def test_a_killed_process_ends_the_other_within_seconds(tmp_path, victim, under_way):
    workdir = tmp_path / "run"
    processes = start_processes(workdir, 2)
    until(processes, lambda: any(workdir.glob(under_way)))
    processes[victim].send_signal(signal.SIGKILL)
    start = time.monotonic()
    output = ended(processes, timeout=60)[1 - victim]
    assert time.monotonic() - start < 10
    assert processes[1 - victim].returncode == EXIT_LOST, output
    message = error_of(output)
    assert f"process {victim} ended: it was killed, or its machine is gone" in message
    assert "the same commands go on from here" in message


# As a save does whose collective fails a moment before the end of another process is heard of.
FAILS_FIRST = """
import os, signal, sys, time
from absl import flags
from expandr_jax.errors import UserError
from train import launch
from expandr_jax.runtime.stopping import Stopped

def main(rest):
    if flags.FLAGS.process == 1:
        raise UserError("a checkpoint cannot be written: AllGather failed")
    time.sleep(1)
    print("ends at", time.monotonic(), flush=True)
    if flags.FLAGS.end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise Stopped

def define():
    launch.define_processes()
    flags.DEFINE_string("end", None, "How process 0 ends.")

launch.launch(main, define, resumes=True)
"""


@pytest.mark.parametrize("end", ["kill", "notice"])
def test_an_error_that_the_end_of_another_process_caused(end):
    together = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", f"--end={end}"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS_FIRST, *together, f"--process={i}"],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    first, output = ended(processes, timeout=120)
    since = float(re.search(r"ends at (\S+)", first)[1])
    assert time.monotonic() - since < SECONDS_TO_STOP  # Both leave at once when both know.
    if end == "kill":
        assert processes[1].returncode == EXIT_LOST, output
        assert "process 0 ended: it was killed" in error_of(output)
    else:
        assert processes[1].returncode == 0, output
        assert "error: " not in output
        assert output.count("stopped by SIGTERM; the same command goes on from here") == 1


# Blocks of unlike sizes, and none at all from one of them, as at the end of step A's examples.
EXCHANGES = """
import sys
import numpy as np
from expandr_jax.runtime import processes

processes.start(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
own = processes.current()
for size in (3, 400_000):
    tokens = np.arange(size * (1 + own.index), dtype=np.int32)
    found = own.exchange({"tokens": tokens, "keys": np.array(["a" * own.index], "S4")})
    assert [len(part["tokens"]) for part in found] == [size, 2 * size]
    assert [part["keys"].tolist() for part in found] == [[b""], [b"a"]]
    assert all((part["tokens"] == np.arange(len(part["tokens"]))).all() for part in found)
assert own.exchange({} if own.index else {"x": tokens[:0]})[1] == {}
own.finish()
"""


def test_two_processes_exchange_arrays():
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXCHANGES, str(i), port],
            cwd=ROOT,
            env={**os.environ, "XLA_FLAGS": ""},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]
    output = ended(processes, timeout=120)
    assert [process.returncode for process in processes] == [0, 0], output


@pytest.mark.slow
def test_a_notice_to_one_process_saves_and_ends_both(tmp_path, divided):
    workdir = tmp_path / "run"
    processes = start_processes(workdir, 2, *SPREAD)
    until(processes, lambda: any((workdir / "checkpoints" / "fine-tuned").glob("[0-9]*")))
    processes[1].send_signal(signal.SIGTERM)
    for process, output in zip(processes, ended(processes, timeout=60), strict=True):
        assert process.returncode == 0, output
        assert "stopped by SIGTERM" in output
        assert "Traceback" not in output
    for process in start_processes(workdir, 2, *SPREAD):
        finish(process)
    for name in ("results.json", "round-0/preferences.jsonl", "runs/expandr.trec"):
        assert (workdir / name).read_bytes() == (divided[0] / name).read_bytes(), name
    assert step_metrics(workdir) == step_metrics(divided[0])


def test_a_process_with_another_config_ends_all(tmp_path):
    processes = start_processes(tmp_path / "run", 2, of_one={1: ("--config.seed=1",)})
    first, second = ended(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "process 1 ended:" in error_of(first)
    assert "seed was 0, now 1" in error_of(first)
    assert "seed was 0, now 1" in error_of(second)


def test_workdirs_that_are_not_shared(tmp_path):
    processes = start_processes(
        tmp_path / "run", 2, of_one={1: (f"--workdir={tmp_path / 'other'}",)}
    )
    _, second = ended(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert "expected a directory that all processes share" in error_of(second)


def test_a_process_without_the_others_address(tmp_path):
    process = start(tmp_path / "run", "--processes=2", "--process=0")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "go together" in error_of(output)
