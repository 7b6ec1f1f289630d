"""Several processes with several devices each, and two of which one is killed in each stage.

.venv/bin/python -m pytest tests/processes_scale_test.py -m slow
"""

import json
import pathlib
import shutil
import signal

import pytest

from configs import smoke as smoke_config
from expandr_jax.data.beir import Collection, write_beir
from expandr_jax.runtime.processes import EXIT_LOST
from tests.commands import EXACT, SPREAD, ended, finish, start, start_processes
from tests.processes_trainers_test import same_results, same_steps

pytestmark = pytest.mark.slow

FILES = ("triples.jsonl", "expansions.jsonl")
# Eight devices: parameters over all of them in step A, and over four in step B, whose batch is 2.
FOUR = (
    "--config.mesh.contrastive=(1,8,1)", "--config.mesh.dpo=(1,2,4)",
    "--config.mesh.sampling=(1,1,2)", "--config.mesh.encoding=(2,1,1)",
)  # fmt: skip
TWO_DEVICES = "--xla_force_host_platform_device_count=2"

# Where one of two processes is killed, in the order of a run; after what, as of tests/killed.py.
KILLS = (
    ("encode the corpus, zero-shot", "vectors in a file"),
    ("hard negatives, round 0", "search"),
    ("candidates, round 0", "texts in a journal"),
    ("rewards, round 0", "vectors"),
    ("rewards, round 0", "search"),
    ("expansions for evaluation, trained generator", "texts in a journal"),
    ("evaluation", "search"),
)


def same_run(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Asserts that a run came to what one process did, and left no share of the work."""
    same_steps(workdir, whole)
    same_results(workdir, whole)
    for name in FILES:
        ours, theirs = (w / "round-0" / name for w in (workdir, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert not list(workdir.glob("work/**/*process-*"))


def test_four_processes_with_two_devices_each_come_to_what_one_does(smoke, tmp_path):
    workdir = tmp_path / "run"
    for process in start_processes(workdir, 4, *FOUR, flags=TWO_DEVICES):
        finish(process)
    same_run(workdir, smoke[0])


def test_two_processes_killed_in_each_stage_come_to_what_one_does(smoke, tmp_path):
    workdir = tmp_path / "run"
    for number, (phase, call) in enumerate(KILLS):
        killed = number % 2
        flags = {killed: (f"--kill_in={phase}", f"--kill_after={call}")}
        processes = start_processes(workdir, 2, *EXACT, of_one=flags, module="tests.killed")
        output = ended(processes)
        assert processes[killed].returncode == -signal.SIGKILL, (phase, call, output)
        assert processes[1 - killed].returncode == EXIT_LOST, (phase, call, output)
    for process in start_processes(workdir, 2, *EXACT):
        finish(process)
    same_run(workdir, smoke[0])


# What process 1 has handed to process 0 when a byte of it changes: phase, after what, the file.
SPOILT = (
    ("encode the corpus, zero-shot", "vectors in a file", "zero-shot.npy.process-1-of-2"),
    ("hard negatives, round 0", "vectors for others", "vectors.process-1.npz"),
    ("hard negatives, round 0", "results for others", "found.process-1.npz"),
    ("expansions, round 0", "texts in a journal", "expansions.jsonl.process-1.part"),
)


def test_a_share_that_is_damaged_is_named_and_ends_all_processes(tmp_path):
    workdir = tmp_path / "run"
    systems = "--config.evaluation.systems=('bm25','expandr')"
    for phase, call, name in SPOILT:
        flags = {1: (f"--kill_in={phase}", f"--kill_after={call}", f"--spoil={name}")}
        processes = start_processes(
            workdir, 2, *EXACT, systems, of_one=flags, module="tests.killed"
        )
        first, second = ended(processes)
        assert [process.returncode for process in processes] == [2, 2], (first, second)
        for output in (first, second):  # By itself, or as what ended the other one, or both.
            assert "Traceback" not in output, output
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            assert errors, output
            assert all(f"{name}:" in line for line in errors), output


def test_two_processes_add_to_a_run_what_one_adds(smoke, tmp_path):
    """A system, a test set and a round come to a finished run."""
    corpus = {f"d{i}": f"a text of number {i} and {i * i}" for i in range(30)}
    queries = {f"q{i}": f"which text has {i}" for i in range(6)}
    qrels = {"test": {f"q{i}": {f"d{i}": 1} for i in range(6)}}
    write_beir(tmp_path / "more", Collection("more", corpus, queries, qrels))
    systems = (*smoke_config.get_config().evaluation.systems, "rrf:bm25:expandr")
    settings = [
        f"--config.evaluation.systems={systems}", "--config.rounds=2",
        f"--config.data.tests={(str(tmp_path / 'more'),)}",
    ]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    for workdir in (one, two):
        shutil.copytree(smoke[0], workdir)
    finish(start(one, *settings))
    for process in start_processes(two, 2, *settings, *SPREAD):
        assert "made again" not in finish(process)
    same_run(two, one)
    assert same_results(two, one) >= {"rrf:bm25:expandr", "expandr-round0"}
    assert "rrf:bm25:expandr" in same_results(*(w / "tests" / "more" for w in (two, one)))
    chosen = [json.loads((w / "results.json").read_text())["chosen"] for w in (one, two)]
    assert chosen[0] == chosen[1]
