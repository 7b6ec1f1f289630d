"""Workdirs in a bucket: what is there after a kill at any moment, and what the others see of it."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import time

import jax.numpy as jnp
import pytest

from expandr_jax.data.records import Journal, write_json, write_text
from expandr_jax.errors import UserError
from expandr_jax.runtime.bucket import Bucket
from expandr_jax.runtime.mirror import Mirror, local_copy, read_marker
from expandr_jax.training.checkpoint import Checkpoints
from tests.commands import SPREAD, command, error_of, finish, start, start_processes, until
from tests.fake_bucket import NAME, serve
from tests.kills_test import same

MARKER = "work/markers/process-{}.json"


@pytest.fixture(scope="module")
def served():
    """One bucket for all tests: gcsfs keeps what it once connected to."""
    with serve() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        Bucket(f"gs://{NAME}")  # Sets how gcsfs works, as in a run, before a test does without one.
        yield bucket


@pytest.fixture
def bucket(served, tmp_path, monkeypatch):
    """The bucket, which does not fail yet, with a directory for what is in it on this machine."""
    monkeypatch.setenv("EXPANDR_SCRATCH", str(tmp_path / "scratch"))
    served.fail = lambda method, name: None
    served.requests.clear()
    served.objects.clear()
    yield served
    served.fail = lambda method, name: None


@pytest.fixture
def open_mirror(tmp_path):
    """A function that gives a process's mirror as it is after `start`: (index, count, disk)."""

    def function(index: int = 0, count: int = 1, disk: str = "disk", said=None) -> Mirror:
        directory = tmp_path / f"{disk}-{index}"
        directory.mkdir(exist_ok=True)
        say = (lambda text: None) if said is None else said.append
        mirror = Mirror("gs://bucket/run", directory, index, count, say)
        mirror.start()
        return mirror

    return function


def files(directory: pathlib.Path) -> dict[str, str]:
    """The text of every file by its name."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_text() for path in found}


def test_another_disk_gets_what_was_pushed(bucket, open_mirror):
    mirror = open_mirror()
    write_text(mirror.directory / "a.txt", "one")
    write_text(mirror.directory / "deep" / "b.txt", "two")
    for name in (".lock", "deep/.b.txt.tmp", "work/compiled/x", "work/reference.tmp.npy"):
        write_text(mirror.directory / name, "of this machine alone")
    mirror.push()
    assert bucket.names() == ["run/a.txt", "run/deep/b.txt", "run/" + MARKER.format(0)]
    assert files(open_mirror(disk="other").directory) == {"a.txt": "one", "deep/b.txt": "two"}


def test_nothing_is_sent_twice(bucket, open_mirror):
    mirror = open_mirror()
    write_text(mirror.directory / "a.txt", "one")
    mirror.push()
    bucket.requests.clear()
    mirror.push()
    write_text(mirror.directory / "a.txt", "one")  # Again, with the same content.
    mirror.push()
    mirror = open_mirror()
    mirror.push()
    assert [name for method, name in bucket.requests if method != "GET"] == []


def test_what_was_removed_is_removed_there_and_elsewhere(bucket, open_mirror):
    mirror, old = open_mirror(), open_mirror(disk="old")
    write_text(mirror.directory / "a.txt", "one")
    mirror.push()
    write_text(old.directory / "left.txt", "over")  # As of a run before, on the same machine.
    (mirror.directory / "a.txt").unlink()
    write_text(mirror.directory / "b.txt", "two")
    mirror.push()
    assert bucket.names() == ["run/b.txt", "run/" + MARKER.format(0)]
    assert files(open_mirror(disk="old").directory) == {"b.txt": "two"}


def test_the_marker_comes_after_what_it_vouches_for(bucket, open_mirror):
    mirror = open_mirror()
    write_text(mirror.directory / "z.txt", "first")
    time.sleep(0.02)
    write_text(mirror.directory / "a.txt", "second")
    bucket.requests.clear()
    mirror.push()
    assert [name for method, name in bucket.requests] == [
        "run/z.txt",
        "run/a.txt",
        "run/" + MARKER.format(0),
    ]


@pytest.mark.parametrize("content", [b"hal", b"", b"another!"])
def test_what_no_marker_vouches_for_is_ignored(bucket, open_mirror, content):
    mirror = open_mirror()
    write_text(mirror.directory / "a.txt", "one")
    mirror.push()
    bucket.put("run/new.txt", content)  # Never vouched for.
    assert files(open_mirror(disk="other").directory) == {"a.txt": "one"}
    bucket.put("run/a.txt", content)  # Not what was vouched for.
    said = []
    assert files(open_mirror(disk="third", said=said).directory) == {}
    assert said == ["gs://bucket/run/a.txt: is damaged or was removed"]


def test_a_killed_push_leaves_one_state_or_the_other(bucket, open_mirror):
    """Whichever request is the last one, each file is as it was or as it was to be, in order."""
    kept = set()
    for last in range(12):
        bucket.objects.clear()
        mirror = open_mirror(disk=f"before-{last}")
        for name in ("grown.txt", "replaced.txt", "sealed.txt"):
            write_text(mirror.directory / name, "old")
        mirror.push()
        with open(mirror.directory / "grown.txt", "a") as file:
            file.write(" and new")
        for name in ("replaced.txt", "added.txt", "sealed.txt"):
            time.sleep(0.01)
            write_text(mirror.directory / name, "new")
        count = [0]

        def fail(method, name, count=count, last=last):
            count[0] += method != "GET"
            return 403 if count[0] > last else None

        bucket.fail = fail
        with contextlib.suppress(UserError):
            mirror.push()
        bucket.fail = lambda method, name: None
        found = files(open_mirror(disk=f"after-{last}").directory)
        assert found.pop("grown.txt") in ("old", "old and new")
        if found["sealed.txt"] == "new":  # It was written last.
            assert found["replaced.txt"] == "new"
        assert set(found) - {"added.txt"} == {"replaced.txt", "sealed.txt"}
        kept.add((found["replaced.txt"], found.get("added.txt"), found["sealed.txt"]))
    assert ("old", None, "old") in kept
    assert ("new", None, "new") in kept  # The last marker is missing.
    assert ("new", "new", "new") in kept


def test_of_a_journal_that_grew_the_rows_vouched_for_are_kept(bucket, open_mirror):
    mirror = open_mirror()
    journal = Journal(mirror.directory / "rows.jsonl")
    journal.append([{"n": 1}])
    mirror.push()
    whole = bucket["run/rows.jsonl.part"]
    bucket.put("run/rows.jsonl.part", whole + b'{"n": 2, "che')  # Its marker never came.
    other = open_mirror(disk="other")
    assert Journal(other.directory / "rows.jsonl").rows == [{"n": 1}]
    journal.finish()
    mirror.push()
    assert bucket.names("run/rows") == ["run/rows.jsonl"]


def test_pieces_wait_for_their_time_and_all_is_sent_in_the_end(bucket, open_mirror):
    mirror = open_mirror()
    write_text(mirror.directory / "a.txt", "one")
    mirror.push()
    write_text(mirror.directory / "a.txt", "two")
    mirror.push(later=True)
    assert bucket["run/a.txt"] == b"one"
    mirror.push()
    assert bucket["run/a.txt"] == b"two"


def test_processes_see_what_the_others_wrote(bucket, open_mirror):
    main, second = open_mirror(0, 2), open_mirror(1, 2)
    write_text(main.directory / "data" / "a.txt", "one")
    write_text(main.directory / "export" / "large.txt", "of no use to others")
    write_text(second.directory / "rows.jsonl.process-1", "its share")
    write_text(second.directory / "work" / "shares" / "v.process-1.npy", "its vectors")
    versions = {0: main.push(), 1: second.push()}
    main.pull(versions)
    second.pull(versions)
    assert files(second.directory)["data/a.txt"] == "one"
    assert "export/large.txt" not in files(second.directory)
    assert files(main.directory)["rows.jsonl.process-1"] == "its share"
    # What belongs to another is not pushed, and is gone here when it is gone there.
    bucket.requests.clear()
    main.push()
    assert not [name for method, name in bucket.requests if method != "GET"]
    shutil.rmtree(second.directory / "work")
    (main.directory / "data" / "a.txt").unlink()
    versions = {0: main.push(), 1: second.push()}
    main.pull(versions)
    second.pull(versions)
    assert "data/a.txt" not in files(second.directory)
    assert "work/shares/v.process-1.npy" not in files(main.directory)


def test_one_process_takes_over_from_several_that_were_killed(bucket, open_mirror):
    main, second = open_mirror(0, 2), open_mirror(1, 2)
    write_text(main.directory / "a.txt", "one")
    write_text(second.directory / "rows.jsonl.process-1", "its share")
    main.push(), second.push()
    alone = open_mirror(0, 1, disk="new")
    assert files(alone.directory) == {"a.txt": "one", "rows.jsonl.process-1": "its share"}
    assert bucket.names("run/work/markers") == ["run/" + MARKER.format(0)]
    (alone.directory / "rows.jsonl.process-1").unlink()
    alone.push()
    assert bucket.names("run/rows") == []


def test_a_reader_waits_for_what_a_writer_goes_on_with(bucket, open_mirror):
    main, second = open_mirror(0, 2), open_mirror(1, 2)
    write_text(main.directory / "a.txt", "one")
    version = main.push()
    marker = bucket["run/" + MARKER.format(0)]
    write_text(main.directory / "a.txt", "two")
    main.push()
    newest = bucket["run/" + MARKER.format(0)]
    bucket.put("run/" + MARKER.format(0), marker)  # As it was between two requests of the reader.
    looks = [0]

    def change(method, name):
        looks[0] += 1
        if looks[0] == 3:
            bucket.put("run/" + MARKER.format(0), newest)

    bucket.fail = change
    second.pull({0: version})
    assert files(second.directory) == {"a.txt": "two"}


def test_a_passing_fault_is_tried_again(bucket, open_mirror):
    mirror = open_mirror()
    answers = iter([503, 429])
    bucket.fail = lambda method, name: next(answers, None)
    write_text(mirror.directory / "a.txt", "one")
    mirror.push()
    assert bucket["run/a.txt"] == b"one"


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"version": 1, "files": {}, "sha256": ""}'])
def test_a_damaged_marker_is_named(bucket, open_mirror, damage):
    open_mirror()
    bucket.put("run/" + MARKER.format(0), damage)
    with pytest.raises(UserError, match=r"gs://bucket/run/work/markers/process-0.json: is damaged"):
        open_mirror(disk="other")


def test_a_damaged_config_is_refused(bucket, open_mirror):
    mirror = open_mirror()
    write_json(mirror.directory / "config.json", {"config": {}})
    mirror.push()
    bucket.put("run/config.json", b"{")
    with pytest.raises(UserError, match=r"gs://bucket/run/config.json: is damaged"):
        open_mirror(disk="other")


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        ("gs://bucket/run", 403, "no permission"),
        ("gs://bucket/run", 401, "no permission"),
        ("gs://nowhere/run", None, "gs://nowhere/run/.*: there is no such bucket"),
    ],
)
def test_a_bucket_that_refuses(bucket, tmp_path, address, status, message):
    bucket.fail = lambda method, name: status if method == "POST" else None
    with pytest.raises(UserError, match=message):
        Mirror(address, tmp_path, 0, 1, print).start()


@pytest.mark.parametrize("address", ["gs://", "gs:///run"])
def test_an_address_without_a_bucket(address):
    with pytest.raises(UserError, match="expected gs://BUCKET/DIRECTORY"):
        Bucket(address)


def test_without_gcsfs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a bucket needs gcsfs: pip install .*\[gcs\]"):
        Bucket("gs://bucket/run")


def test_a_copy_of_what_is_asked_for(bucket, open_mirror):
    mirror = open_mirror()
    for name in ("config.json", "data/a.txt", "export/large.txt"):
        write_text(mirror.directory / name, name)
    mirror.push()
    directory = local_copy("gs://bucket/run", "config.json", "data")
    assert files(directory) == {"config.json": "config.json", "data/a.txt": "data/a.txt"}
    assert local_copy("some/run", "data") == pathlib.Path("some/run").absolute()


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
    apart = (".lock", "work/compiled/", "work/markers/", "tensorboard/", "checkpoints/")
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
    """One of them is killed, both disks are lost, and they end with the results of one process."""
    processes = start_processes("gs://bucket/run", 2, *SPREAD)
    until(processes, lambda: any("candidates.jsonl" in n for n in bucket.names("run/work/")))
    processes[1].send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate(timeout=60)
    shutil.rmtree(tmp_path / "scratch")
    for process in start_processes("gs://bucket/run", 2, *SPREAD):
        finish(process)
    workdir = fetched(bucket, tmp_path)
    assert not [name for name in bucket.names("run/work/") if "process-1" in name and
                "markers" not in name]  # fmt: skip
    ours, theirs = (json.loads((w / "results.json").read_text()) for w in (workdir, smoke[0]))
    assert ours["chosen"] == theirs["chosen"]
    assert ours["rows"] == theirs["rows"]
    assert names_of(workdir) == names_of(smoke[0])
    before = bucket["run/results.json"]
    finish(start("gs://bucket/run"))  # One alone finds it finished.
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
