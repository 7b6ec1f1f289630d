"""Directories kept the same as a bucket: what is there after a kill, what other processes see."""

import contextlib
import pathlib
import shutil
import time

import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal, write_json, write_text
from expandr_jax.runtime.bucket import Bucket
from expandr_jax.runtime.mirror import Mirror, local_copy

MARKER = "work/markers/process-{}.json"


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
    assert [*Journal(other.directory / "rows.jsonl").rows] == [{"n": 1}]
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
    indexes = "work/splade.index-0a/index.json", "work/tests/set/splade.index-1b/index.json"
    for name in ("export/large.txt", *indexes):
        write_text(main.directory / name, "of no use to others")
    write_text(second.directory / "rows.jsonl.process-1", "its share")
    write_text(second.directory / "work" / "shares" / "v.process-1.npy", "its vectors")
    versions = {0: main.push(), 1: second.push()}
    main.pull(versions)
    second.pull(versions)
    assert files(second.directory)["data/a.txt"] == "one"
    assert not {"export/large.txt", *indexes} & {*files(second.directory)}
    assert {*indexes} < {*files(open_mirror(0, 2, disk="new").directory)}
    assert not {*indexes} & {*files(open_mirror(1, 2, disk="new").directory)}
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


def test_other_processes_read_parts_of_vectors_that_they_do_not_fetch(bucket, open_mirror):
    main, other = open_mirror(0, 2), open_mirror(1, 2)
    path = main.directory / "work" / "vectors" / "a.npy"
    write_text(path, "0123456789")
    write_text(path.with_name("a.npy.jsonl"), "what it has")
    other.pull({0: main.push()})
    assert files(other.directory) == {"work/vectors/a.npy.jsonl": "what it has"}
    here = other.directory / "work" / "vectors" / "a.npy"
    assert other.read(here, 2, 5) == main.read(path, 2, 5) == b"234"
    write_text(here.with_name(".a.npy.rows-0-5"), "01234")
    other.push()
    assert not [name for name in bucket.names() if "rows" in name]
    other = open_mirror(1, 2)  # It stays on this machine, also from one start to the next.
    assert here.with_name(".a.npy.rows-0-5").exists()
    bucket.fail = lambda method, name: 403 if name.endswith("a.npy") else None
    with pytest.raises(UserError, match=r"a\.npy: no permission"):
        other.read(here, 0, 3)
