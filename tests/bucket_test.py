"""Runs whose workdir is in a bucket: killed, refused, stopped, divided over hosts, and read."""

import json
import os
import pathlib
import shutil
import signal
import time

import jax.numpy as jnp
import pytest

from expandr_jax.errors import UserError
from expandr_jax.runtime.bucket import Bucket
from expandr_jax.runtime.mirror import read_marker
from expandr_jax.training.checkpoint import Checkpoints
from tests.commands import EXACT, SPREAD, command, error_of, finish, start, start_processes, until
from tests.kills_test import same


def test_a_damaged_checkpoint_is_set_aside_but_not_one_that_cannot_be_reached(bucket):
    tree = {"a": jnp.arange(6.0), "b": jnp.ones((2, 2), jnp.int32)}
    address = "gs://bucket/alone/checkpoints/toy"
    checkpoints = Checkpoints(address, {"model": "x"})
    for step in (1, 2):
        checkpoints.save(step, {**tree, "a": tree["a"] + step})
    checkpoints.wait()
    assert bucket["alone/checkpoints/toy/2/commit_success.txt"]
    step, found = Checkpoints(address, {"model": "x"}).restore(tree)
    assert (step, found["a"].tolist()) == (2, (tree["a"] + 2).tolist())

    checkpoints = Checkpoints(address, {"model": "x"})
    bucket.fail = lambda method, name: 403 if "/state/" in name else None
    with pytest.raises(UserError, match="a checkpoint cannot be read"):
        checkpoints.restore(tree)
    bucket.fail = lambda method, name: None
    data = next(n for n in bucket.names("alone/checkpoints/toy/2/state/d/"))
    bucket.put(data, bucket[data][: len(bucket[data]) // 2])
    step, found = Checkpoints(address, {"model": "x"}).restore(tree)
    assert (step, found["a"].tolist()) == (1, (tree["a"] + 1).tolist())
    assert bucket.names("alone/checkpoints/toy-damaged/2/")
    assert not bucket.names("alone/checkpoints/toy/2/")

    def save() -> None:
        checkpoints = Checkpoints(address, {"model": "x"})
        checkpoints.save(3, tree)
        checkpoints.wait()

    bucket.fail = lambda method, name: 403 if method == "POST" else None
    with pytest.raises(UserError, match="a checkpoint cannot be written"):
        save()


def fetched(bucket, target: pathlib.Path) -> pathlib.Path:
    """All that a run has in the bucket, as files."""
    for name in bucket.names("run/"):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bucket[name])
    return target / "run"


def names_of(workdir: pathlib.Path) -> set[str]:
    """What a run is to have, but for files with names of the moment or of this machine."""
    found = (path.relative_to(workdir).as_posix() for path in workdir.rglob("*") if path.is_file())
    apart = (
        ".lock", "work/compiled/", "work/documents/", "work/markers/", "tensorboard/",
        "checkpoints/",
    )  # fmt: skip
    return {name for name in found if not name.startswith(apart)}


def test_what_a_killed_save_left_is_gone_before_steps_are_looked_for(bucket):
    bucket.put("run/checkpoints/toy/3/state/part", b"half")
    bucket.fail = lambda method, name: time.sleep(0.5) if method == "DELETE" else None
    Checkpoints("gs://bucket/run/checkpoints/toy", {})
    assert bucket.names("run/") == []


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_the_same_on_another_disk(smoke, bucket, tmp_path):
    process = start("gs://bucket/run")
    until([process], lambda: any("checkpoints/retriever" in n for n in bucket.names()))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    shutil.rmtree(tmp_path / "scratch")
    output = finish(start("gs://bucket/run"))
    assert "report: gs://bucket/run/report.html" in output
    workdir = fetched(bucket, tmp_path)
    same(workdir, smoke[0])
    assert names_of(workdir) == names_of(smoke[0])
    steps = {int(n.split("/")[3]) for n in bucket.names("run/checkpoints/retriever/")}
    assert {str(step) for step in steps} <= set(os.listdir(smoke[0] / "checkpoints/retriever"))
    found = read_marker(Bucket("gs://bucket/run"))[1]
    assert names_of(workdir) <= set(found)


def test_a_bucket_that_refuses_writes_ends_a_run_in_one_line(bucket):
    bucket.fail = lambda method, name: 403 if method == "POST" else None
    process = start("gs://bucket/run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "gs://bucket/run/" in error_of(output)
    assert "no permission" in error_of(output)


@pytest.mark.slow
def test_permission_that_is_taken_away_while_it_trains(bucket, tmp_path):
    process = start("gs://bucket/run")
    until([process], lambda: any("checkpoints/fine-tuned" in n for n in bucket.names()))
    bucket.fail = lambda method, name: 403 if method == "POST" else None
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 2, output
    # tensorstore prints by itself what becomes of the parts that were under way.
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "gs://bucket/run/" in message


@pytest.mark.slow
def test_a_notice_in_a_round_keeps_what_was_sampled(smoke, bucket, tmp_path):
    process = start("gs://bucket/run")
    scratch = tmp_path / "scratch" / "gs%3A%2F%2Fbucket%2Frun"
    until([process], (scratch / "work" / "round-0").exists)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "the same command goes on from here" in output
    for journal in scratch.glob("work/round-0/*.part"):
        assert bucket[f"run/work/round-0/{journal.name}"] == journal.read_bytes()
    shutil.rmtree(tmp_path / "scratch")
    finish(start("gs://bucket/run"))
    same(fetched(bucket, tmp_path), smoke[0])


@pytest.mark.slow
def test_two_hosts_with_a_bucket_alone_in_common(smoke, bucket, tmp_path):
    """One of them is killed, both disks are lost, and they end with the results of one process.

    Each has the vectors that it searches alone.
    """
    options = *SPREAD, *EXACT
    processes = start_processes("gs://bucket/run", 2, *options)
    until(processes, lambda: any("candidates.jsonl" in n for n in bucket.names("run/work/")))
    processes[1].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=60)
    shutil.rmtree(tmp_path / "scratch")
    for process in start_processes("gs://bucket/run", 2, *options):
        finish(process)
    (one,) = (tmp_path / "scratch").glob("*-process-1")
    assert {path.name for path in (one / "work/vectors").glob("*.npy")} == set()
    kept = {path.name.partition(".npy")[0] for path in (one / "work/vectors").glob(".*.rows-*")}
    assert kept == {".zero-shot", ".fine-tuned", ".expandr"}
    workdir = fetched(bucket, tmp_path)
    assert not [name for name in bucket.names("run/work/") if "process-1" in name and
                "markers" not in name]  # fmt: skip
    ours, theirs = (json.loads((w / "results.json").read_text()) for w in (workdir, smoke[0]))
    assert ours["chosen"] == theirs["chosen"]
    assert ours["rows"] == theirs["rows"]
    indexes = {name for name in names_of(smoke[0]) if ".index-" in name and "vectors" in name}
    assert names_of(workdir) == names_of(smoke[0]) - indexes  # Exact search has none.
    before = bucket["run/results.json"]
    finish(start("gs://bucket/run", *EXACT))  # One alone finds it finished.
    assert bucket["run/results.json"] == before


@pytest.mark.slow
def test_other_commands_read_it(bucket, tmp_path):
    finish(start("gs://bucket/run"))
    shutil.rmtree(tmp_path / "scratch")
    output = finish(command("eval.search", "--workdir=gs://bucket/run", "how do I clip gradients"))
    assert "query + expansion" in output
    target = tmp_path / "out"
    finish(command("train.export", "--workdir=gs://bucket/run", f"--to={target}",
                   "--format=retriever"))  # fmt: skip
    assert (target / "model.safetensors").exists()
