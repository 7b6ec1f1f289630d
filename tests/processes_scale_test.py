"""Several processes with several devices each come to what one process does.

.venv/bin/python -m pytest tests/processes_scale_test.py -m slow
"""

import pathlib

import pytest

from tests.commands import finish, start_processes
from tests.processes_trainers_test import same_results, same_steps

pytestmark = pytest.mark.slow

FILES = ("triples.jsonl", "expansions.jsonl")
# Eight devices: parameters over all of them in step A, and over four in step B, whose batch is 2.
FOUR = (
    "--config.mesh.contrastive=(1,8,1)", "--config.mesh.dpo=(1,2,4)",
    "--config.mesh.sampling=(1,1,2)", "--config.mesh.encoding=(2,1,1)",
)  # fmt: skip
TWO_DEVICES = "--xla_force_host_platform_device_count=2"


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
