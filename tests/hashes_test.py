"""Files are read once by a process while they stay as they are, and by each start all the same."""

import os
import time

import pytest

from expandr_jax.data.beir import Collection, read_beir, source_hashes, write_beir
from expandr_jax.data.places import only_collection
from expandr_jax.errors import UserError
from expandr_jax.files import hashes
from expandr_jax.files.records import hash_file
from expandr_jax.runtime.checksums import Checksums


@pytest.fixture
def read(monkeypatch):
    """The files that are read to be hashed, by a process that has hashed nothing before."""
    seen = []

    def counted(path):
        seen.append(os.path.basename(path))
        return hash_file(path)

    monkeypatch.setattr(hashes, "hash_file", counted)
    monkeypatch.setattr(hashes, "_known", {})
    return seen


def settle():
    """Waits until a change has another time than the one before."""
    time.sleep(0.05)


def test_a_file_is_read_again_when_anything_of_it_has_changed(tmp_path, monkeypatch, read):
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)
    path = tmp_path / "file"
    path.write_text("before")
    settle()
    first = hashes.hash_once(path)
    assert hashes.hash_once(path) == first == hash_file(path)
    assert read == ["file"]
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text("beyond")  # Of the same size, and with its time put back.
    os.utime(path, ns=times)
    assert hashes.hash_once(path) == hash_file(path) != first
    other = tmp_path / "other"
    other.write_text("before")
    os.replace(other, path)
    assert hashes.hash_once(path) == first
    path.unlink()
    with pytest.raises(UserError, match="file: cannot read it: No such file"):
        hashes.hash_once(path)
    assert read == ["file"] * 4


def test_what_has_just_changed_is_not_taken_for_what_it_was(tmp_path, read):
    path = tmp_path / "file"
    path.write_text("before")
    assert hashes.hash_once(path) == hashes.hash_once(path) == hash_file(path)
    assert read == ["file"] * 2


def test_a_start_reads_each_file_of_a_run_once(tmp_path, monkeypatch, read):
    """By its checksums, by the key of its documents and by what it says of its source."""
    monkeypatch.setattr(hashes, "_SETTLED", 0.0)
    judged = {"test": {"q": {"d": 1}}}
    write_beir(tmp_path / "data", Collection("data", {"d": "text"}, {"q": "query"}, judged))
    checksums = Checksums(tmp_path, lambda text: None)
    checksums.record("data")
    store = tmp_path / "store"
    read_beir(tmp_path / "data", store=store)
    settle()
    hashes._known.clear()
    read.clear()
    for _ in range(2):
        assert Checksums(tmp_path, lambda text: None).intact("data")
        read_beir(tmp_path / "data", store=store)
        source_hashes(only_collection(tmp_path / "data"))
    files = ["corpus.jsonl", "documents.arrow", "ids.npy", "queries.jsonl", "test.tsv"]
    assert sorted(read) == files
