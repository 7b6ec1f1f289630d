"""Checksums of finished files."""

import pytest

from expandr_jax.runtime.checksums import Checksums


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "round-0").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "round-0" / name).write_text(f"what {name} holds\n")
    checksums = Checksums(tmp_path, print)
    assert not (tmp_path / "work").exists()
    checksums.record("round-0")
    return tmp_path


def opened(workdir):
    said = []
    return Checksums(workdir, said.append), said


def test_what_is_sealed_is_intact(workdir):
    checksums, said = opened(workdir)
    assert checksums.intact("round-0")
    assert checksums.intact("round-0/a.jsonl", "round-0/b.jsonl")
    assert not said


@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete", "add"])
def test_what_is_damaged_is_named_and_removed(workdir, how):
    file = workdir / "round-0" / "a.jsonl"
    content = file.read_bytes()
    if how == "delete":
        file.unlink()
    elif how == "add":
        (workdir / "round-0" / "c.jsonl").write_text("not one of them")
    else:
        changed = {"flip": b"v" + content[1:], "truncate": content[:4], "empty": b""}[how]
        file.write_bytes(changed)
    checksums, said = opened(workdir)
    assert not checksums.intact("round-0")
    assert len(said) == 1
    assert "round-0: is damaged or was removed; it is made again" in said[0]
    assert not (workdir / "round-0").exists()


def test_what_has_changed_stays_where_it_is_only_looked_at(workdir):
    checksums, said = opened(workdir)
    assert checksums.unchanged("round-0", "round-0/a.jsonl")
    assert not checksums.unchanged("round-0", "results.json")  # It was never finished.
    (workdir / "round-0" / "a.jsonl").write_text("other")
    assert not checksums.unchanged("round-0")
    assert not said
    assert (workdir / "round-0" / "a.jsonl").read_text() == "other"


def test_files_of_one_stage_go_together(workdir):
    (workdir / "round-0" / "a.jsonl").unlink()
    checksums, said = opened(workdir)
    assert not checksums.intact("round-0/a.jsonl", "round-0/b.jsonl")
    assert "a.jsonl" in said[0]
    assert not list((workdir / "round-0").iterdir())


def test_what_was_never_finished_is_removed_without_a_word(workdir):
    (workdir / "half").write_text("a kill came in between")
    checksums, said = opened(workdir)
    assert not checksums.intact("half")
    assert not checksums.intact("absent")
    assert not said
    assert not (workdir / "half").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"files": {}, "sha256": "0"}'])
def test_damaged_checksums_mean_that_nothing_is_known(workdir, content):
    (workdir / "work" / "seals.json").write_bytes(content)
    checksums, said = opened(workdir)
    assert "damaged" in said[0]
    assert not checksums.intact("round-0")


def test_a_file_sealed_again_is_known_by_its_new_content(workdir):
    (workdir / "round-0" / "a.jsonl").write_text("new")
    checksums, _ = opened(workdir)
    checksums.record("round-0/a.jsonl")
    assert opened(workdir)[0].intact("round-0")
