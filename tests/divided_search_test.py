"""Search that processes divide: what one finds, to the bit, each in its part of the memory."""

import gc
import threading
import time
import weakref
from collections import Counter

import jax
import numpy as np
import pytest

from expandr_jax.runtime.processes import Processes
from expandr_jax.search import (
    Bm25Index,
    ExactIndex,
    ExactOptions,
    ScannIndex,
    kept_bm25,
    scann,
)
from expandr_jax.search import divided as divided_module
from expandr_jax.search import exact as exact_module
from expandr_jax.search.divided import (
    DividedIndex,
    DividedWords,
    found_by_all,
    share_of_blocks,
)
from expandr_jax.vectors import corpus as corpus_module
from expandr_jax.vectors.corpus import Corpus
from tests.commands import ended, finish, start_processes, until
from tests.corpus_test import section
from tests.divided_search import measure
from tests.kept_index_test import write
from tests.processes_test import group, together  # noqa: F401 (the fixture)
from tests.processes_trainers_test import same_results

ROWS, WIDTH = 500, 16


@pytest.fixture(scope="module")
def vectors():
    found = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    found[250:450] = found[50:250]  # Ties between parts.
    return found


def divided(member, vectors, options, shares, rows=None):
    block = min(options.block_rows, len(vectors))
    rows = rows or (lambda start, end: vectors[start:end])
    return DividedIndex(
        "v", *vectors.shape,
        share_of_blocks(len(vectors), block, member.index, member.count),
        lambda start, end: ExactIndex(rows(start, end), options, block_rows=block),
        options.query_rows, member, shares,
    )  # fmt: skip


@pytest.mark.parametrize("block_rows", [7, 64, 200, 8192])
@pytest.mark.parametrize("k", [1, 60, 10_000])
def test_what_processes_find_is_what_one_finds(group, tmp_path, vectors, block_rows, k):  # noqa: F811
    options = ExactOptions(block_rows, query_rows=4)
    queries = np.random.default_rng(1).normal(size=(9, WIDTH)).astype(np.float32)
    queries[:4] = vectors[100:104]
    expected = ExactIndex(vectors, options).search(queries, k)

    def function(member: Processes):
        index = divided(member, vectors, options, tmp_path)
        found = index.search(queries, k) if member.is_main else None
        member.barrier()
        return index.spans, found

    answers = together(group, function)
    for found, wanted in zip(answers[0][1], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert found.dtype == wanted.dtype
    spans = [span for spans, _ in answers for span in spans]
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])]
    assert spans[-1][1] == ROWS
    assert not list(tmp_path.iterdir())


def test_each_process_reads_its_part_alone_and_only_for_a_search(group, tmp_path, vectors):  # noqa: F811
    read, lock = [], threading.Lock()

    def function(member: Processes):
        def rows(start, end):
            with lock:
                read.append((start, end))
            return vectors[start:end]

        index = divided(member, vectors, ExactOptions(50), tmp_path, rows)
        member.barrier()
        assert not read
        member.barrier()
        if member.is_main:
            index.search(vectors[:2], 3)
            index.search(vectors[:2], 3)
        member.barrier()
        index.release()

    together(group, function)
    assert sorted(read) == [(0, 150), (150, 300), (300, 500)]


def test_processes_that_run_ahead_keep_nothing_when_the_first_has_searched(
    group,  # noqa: F811
    tmp_path,
    vectors,
    monkeypatch,
):
    """On devices with a memory of their own, where blocks stay from one search to the next."""
    monkeypatch.setattr(exact_module, "shares_memory", lambda device: False)
    read, lock = [], threading.Lock()

    def blocks() -> int:
        gc.collect()
        return sum(array.shape == (50, WIDTH) for array in jax.live_arrays())

    def function(member: Processes):
        def rows(start, end):
            with lock:
                read.append((start, end))
            return vectors[start:end]

        index = divided(member, vectors, ExactOptions(50), tmp_path, rows)
        member.barrier()
        if member.is_main:
            time.sleep(0.1)  # The others are done with it by now, and wait for what comes next.
            index.search(vectors[:2], 3)
            index.search(vectors[:2], 3)
            held.append(blocks())
        index.release()
        member.barrier()
        return index

    before, held = blocks(), []
    indexes = together(group, function)
    assert held == [before + ROWS // 50]
    assert blocks() == before
    assert len(read) == len(indexes)  # Each once, for all searches.


def test_the_last_of_many_queries_are_found_as_the_first(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr("expandr_jax.search.divided._QUERIES", 8)
    options, alone = ExactOptions(64, query_rows=4), Processes()
    queries = vectors[:17]
    found = divided(alone, vectors, options, tmp_path).search(queries, 5)
    for ours, theirs in zip(found, ExactIndex(vectors, options).search(queries, 5), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert divided(alone, vectors, options, tmp_path).search(queries[:0], 5)[0].shape == (0, 5)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_queries_for_words_are_shared_and_find_what_one_finds(group, tmp_path, count):  # noqa: F811
    texts = [f"cat {i % 7} dog {i % 11} ran" for i in range(90)]
    queries = [f"dog {i % 5} cat {i % 3}" for i in range(count)]
    expected = kept_bm25(tmp_path / "work", texts).search(queries, 30)
    searched = Counter()

    def function(member: Processes):
        index = kept_bm25(tmp_path / "work", texts, write=member.is_main)

        def counted(asked, k):
            searched[member.index] += len(asked)
            return Bm25Index._search(index, asked, k)

        index._search = counted
        words = DividedWords("", lambda: index, member, tmp_path / "shares")
        member.barrier()
        found = found_by_all(lambda: words().search(queries, 30), member, tmp_path / "shares")
        assert words().frequency("cat") == 90
        return found

    for found in together(group, function):
        for ours, wanted in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, wanted)
            assert ours.dtype == wanted.dtype
    assert searched.total() == count
    assert len(searched) == min(count, 3)
    assert not list((tmp_path / "shares").iterdir())


def test_an_index_of_words_is_let_go_of_by_all_when_the_first_does(group, tmp_path):  # noqa: F811
    """Those that run ahead still answer what it asks; further collections' indexes stayed."""
    texts, lock = [f"cat {i % 7} dog {i % 11} ran" for i in range(90)], threading.Lock()
    queries, opened = [f"dog {i}" for i in range(6)], []

    def function(member: Processes):
        def open_index():
            index = Bm25Index(texts)
            with lock:
                opened.append(weakref.ref(index))
            return index

        words, alive = DividedWords("", open_index, member, tmp_path), []
        for _ in range(2):
            if member.is_main:
                words().search(queries, 5)
                alive.append(sum(index() is not None for index in opened))
            words.release()
            for _ in range(2):  # By the second one all have done what they were told.
                member.barrier()
            gc.collect()
            alive.append(sum(index() is not None for index in opened))
            member.barrier()
        return alive

    assert together(group, function)[0] == [3, 0] * 2
    assert len(opened) == 6


@pytest.mark.skipif(not scann.installed(), reason="there is no ScaNN wheel")
@pytest.mark.parametrize("count", [1, 3])
def test_shards_of_scann_are_made_once_by_any_number_of_processes(
    group,  # noqa: F811
    tmp_path,
    vectors,
    monkeypatch,
    count,
):
    monkeypatch.setattr(divided_module, "SHARD_ROWS", 200)
    monkeypatch.setattr(corpus_module, "SHARD_ROWS", 200)
    path, queries = tmp_path / "work" / "a.npy", vectors[:9, :8]
    path.parent.mkdir()
    write(path, ROWS)
    settings = section(**{"search.backend": "scann", "search.scann.method": "tree"})

    def search(member: Processes):
        corpus = Corpus([""] * ROWS, None, settings, path, processes=member,
                        shares=tmp_path / "work" / "shares")  # fmt: skip
        index = corpus.index
        found = index.search(queries, 20) if member.is_main else None
        member.barrier()
        corpus.release()
        return found

    first = together(group, search)[0] if count == 3 else search(Processes())
    made = sorted(path.parent.glob("a.shard-*.index-*"))
    assert len(made) == 3

    def refuse(*_):
        raise AssertionError("an index is built")

    monkeypatch.setattr(ScannIndex, "__init__", refuse)
    for again in (together(group, search)[0], search(Processes())):
        for ours, theirs in zip(again, first, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert sorted(path.parent.glob("a.shard-*.index-*")) == made


@pytest.mark.slow
def test_a_process_holds_its_part_of_the_vectors():
    # What a process needs for itself differs by up to 12 MB from one start to the next: at 200,000
    # vectors that is as much as a part.
    held = measure(2_000_000, 4)
    assert all(above <= 1.3 * part for above, part in held), held


@pytest.mark.slow
def test_two_processes_killed_while_they_search_go_on(smoke, tmp_path):
    workdir = tmp_path / "run"
    settings = ("--config.search.backend=exact", "--config.search.exact.block_rows=16")
    processes = start_processes(workdir, 2, *settings)
    shares = workdir / "work" / "shares"
    until(processes, lambda: any(shares.glob("queries.npz")) or any(shares.glob("found.*")))
    for process in processes:
        process.kill()
    ended(processes)
    assert not (workdir / "round-0" / "preferences.jsonl").exists()
    for process in start_processes(workdir, 2, *settings):
        finish(process)
    same_results(workdir, smoke[0])
    for name in ("round-0/triples.jsonl", "round-0/expansions.jsonl"):
        assert (workdir / name).read_bytes() == (smoke[0] / name).read_bytes(), name
    assert not any(shares.iterdir())
