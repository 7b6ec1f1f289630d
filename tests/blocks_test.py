"""Rows of vectors that lie elsewhere: fetched by blocks, checked, and searched as the whole is."""

import hashlib
import shutil

import numpy as np
import pytest

from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal
from expandr_jax.runtime.processes import Processes
from expandr_jax.search import divided as divided_module
from expandr_jax.search import scann
from expandr_jax.vectors import corpus as corpus_module
from expandr_jax.vectors.blocks import fetch_rows, is_within_reach, open_rows, width_of
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.stored import from_storage, to_storage
from tests.corpus_test import section
from tests.processes_test import group, together  # noqa: F401 (the fixture)

BLOCK, ROWS, WIDTH = 8, 50, 4


@pytest.fixture(params=["float32", "int8"])
def dtype(request):
    return request.param


@pytest.fixture
def whole(tmp_path, dtype):
    """Where all of it lies, and the vectors as that file has them."""
    vectors = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    stored = to_storage(vectors, dtype)
    path = tmp_path / "main" / "v.npy"
    path.parent.mkdir()
    np.save(path, stored)
    journal = Journal(f"{path}.jsonl")
    for start in range(0, ROWS, BLOCK):
        part = stored[start : start + BLOCK]
        digest = hashlib.sha256(part.tobytes()).hexdigest()
        journal.append([{"rows": len(part), "width": WIDTH, "sha256": digest}])
    journal.finish()
    return path, from_storage(stored)[:]


@pytest.fixture
def reads(whole):
    """What was read of the file: calls of a function that reads it, for whatever path."""
    calls = []

    def read(_, start: int, end: int) -> bytes:
        calls.append((start, end))
        return whole[0].read_bytes()[start:end]

    read.calls = calls
    return read


@pytest.fixture
def here(tmp_path, whole):
    """Where the file would be on a machine that has its journal alone."""
    path = tmp_path / "other" / "v.npy"
    path.parent.mkdir()
    assert not is_within_reach(path)
    shutil.copy(f"{whole[0]}.jsonl", path.parent)
    assert is_within_reach(path)
    return path


def test_rows_are_fetched_by_the_blocks_that_have_them_and_no_others(whole, here, reads, dtype):
    told = []
    spans = [(10, 30), (44, 50)]
    fetch_rows(here, spans, dtype, reads, told.append)
    assert len(reads.calls) == 3 + 2
    assert sum(told) == 26
    assert not here.exists()
    assert width_of(here) == WIDTH
    for start, end in spans:
        np.testing.assert_array_equal(open_rows(here, start, end)[:], whole[1][start:end])
    fetch_rows(here, spans, dtype, reads, told.append)
    assert len(reads.calls) == 5  # What is here is not read again elsewhere.
    fetch_rows(here, [(0, 3)], dtype, reads, told.append)
    assert len(reads.calls) == 6
    assert [path.name for path in here.parent.glob(".*")] == [".v.npy.rows-0-8"]


@pytest.mark.parametrize("damage", ["a byte", "the end", "the header", "more"])
def test_what_is_damaged_here_is_fetched_again(whole, here, reads, dtype, damage):
    fetch_rows(here, [(8, 24)], dtype, reads, lambda _: None)
    (kept,) = here.parent.glob(".*")
    good = kept.read_bytes()
    kept.write_bytes(
        {
            "a byte": good[:-3] + bytes([good[-3] ^ 1]) + good[-2:],
            "the end": good[:-5],
            "the header": b"x" * 20 + good[20:],
            "more": good + b"more",
        }[damage]
    )
    fetch_rows(here, [(8, 24)], dtype, reads, lambda _: None)
    assert kept.read_bytes() == good
    assert len(reads.calls) == 2 + (damage in ("a byte", "the end"))


def test_what_is_damaged_elsewhere_is_named(whole, here, reads, dtype):
    data = bytearray(whole[0].read_bytes())
    data[-1] ^= 1
    whole[0].write_bytes(data)
    fetch_rows(here, [(8, 24)], dtype, reads, lambda _: None)
    with pytest.raises(UserError, match=r"v.npy: what others have of vectors 48 to 50 is damaged"):
        fetch_rows(here, [(40, 50)], dtype, reads, lambda _: None)


@pytest.mark.parametrize("backend", ["exact", "scann"])
def test_processes_that_have_their_rows_alone_find_what_one_finds(
    group,  # noqa: F811
    whole,
    reads,
    dtype,
    tmp_path,
    monkeypatch,
    backend,
):
    if backend == "scann" and not scann.installed():
        pytest.skip("there is no ScaNN wheel")
    for module in (divided_module, corpus_module):
        monkeypatch.setattr(module, "SHARD_ROWS", 2 * BLOCK)
    settings = section(**{
        "search.backend": backend, "search.exact.block_rows": 7, "search.scann.method": "brute",
    })  # fmt: skip
    ids, path = [""] * ROWS, whole[0]
    shares = tmp_path / "shares"

    def search(member: Processes):
        own = path
        if not member.is_main:
            own = tmp_path / f"disk-{member.index}" / path.name
            own.parent.mkdir()
            shutil.copy(f"{path}.jsonl", own.parent)
        # What they know the index by is where it lies below the workdir.
        corpus = Corpus(ids, None, settings, own, processes=member, shares=own.parent / "shares")
        corpus.index._shares = shares
        if not member.is_main:
            fetch_rows(own, corpus.index.spans, dtype, reads, lambda _: None)
        found = corpus.index.search(whole[1][:9], 20) if member.is_main else None
        member.barrier()
        return found

    found = together(group, search)[0]
    alone = Corpus(ids, whole[1], section(**{"search.backend": "exact"})).index
    expected = alone.search(whole[1][:9], 20)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
