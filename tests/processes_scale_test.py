"""Several processes with several devices each, and two of which one is killed in each stage.

.venv/bin/python -m pytest tests/processes_scale_test.py -m slow
"""

import pathlib
import signal

import pytest

from expandr_jax.runtime.processes import EXIT_LOST
from tests.commands import ended, finish, start_processes
from tests.processes_trainers_test import same_results, same_steps

pytestmark = pytest.mark.slow

FILES = ("triples.jsonl", "expansions.jsonl")
# Eight devices: parameters over all of them in step A, and over four in step B, whose batch is 2.
FOUR = (
    "--config.mesh.contrastive=(1,8,1)", "--config.mesh.dpo=(1,2,4)",
    "--config.mesh.sampling=(1,1,2)", "--config.mesh.encoding=(2,1,1)",
)  # fmt: skip
TWO_DEVICES = "--xla_force_host_platform_device_count=2"

# Search is divided where it is exact, and there are several blocks.
EXACT = ("--config.search.backend=exact", "--config.search.exact.block_rows=16")
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
    for phase, call in KILLS:
        flags = {1: (f"--kill_in={phase}", f"--kill_after={call}")}
        processes = start_processes(workdir, 2, *EXACT, of_one=flags, module="tests.killed")
        output = ended(processes)
        assert processes[1].returncode == -signal.SIGKILL, (phase, call, output)
        assert processes[0].returncode == EXIT_LOST, (phase, call, output)
    for process in start_processes(workdir, 2, *EXACT):
        finish(process)
    same_run(workdir, smoke[0])
