"""Indexes that are made once: kept beside the vectors, opened by restarts, let go of after use."""

import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from expandr_jax import search
from expandr_jax.errors import UserError
from expandr_jax.files.records import Journal
from expandr_jax.search import Bm25Index, ScannIndex, kept_bm25, kept_index, scann
from expandr_jax.vectors.corpus import Corpus
from tests.commands import ROOT
from tests.corpus_test import section

needs_scann = pytest.mark.skipif(not scann.installed(), reason="there is no ScaNN wheel")
TEXTS = ["the cat sat", "a dog sat on a dog", "birds fly high"]


@pytest.fixture
def no_building(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("an index is built")

    def call():
        for kind in search.BACKENDS.values():
            monkeypatch.setattr(kind, "__init__", refuse)

    return call


def write(path, rows, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    np.save(path, vectors)
    path.with_name(f"{path.name}.jsonl").unlink(missing_ok=True)
    journal = Journal(f"{path}.jsonl")
    journal.append([{"sha256": search.fingerprint(vectors)}])
    journal.finish()
    return vectors


@needs_scann
def test_an_index_of_vectors_is_made_once_and_opened_by_all_others(tmp_path, no_building):
    path = tmp_path / "zero-shot.npy"
    vectors = write(path, 400)
    settings = section(**{"search.backend": "scann", "search.scann.method": "tree"})
    made = Corpus([], vectors, settings, path).index
    (directory,) = tmp_path.glob("*.index-*")
    found = made.search(vectors[:9], 20)
    no_building()
    for writes in (True, False):
        opened = Corpus([], vectors, settings, path, writes=writes).index
        assert isinstance(opened, ScannIndex)
        for ours, theirs in zip(opened.search(vectors[:9], 20), found, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert list(tmp_path.glob("*.index-*")) == [directory]


@needs_scann
def test_other_vectors_or_options_have_another_index(tmp_path):
    path = tmp_path / "a.npy"
    settings = {"search.backend": "scann", "search.scann.method": "ah"}
    kept = set()
    for seed, reorder in ((0, 30), (1, 30), (1, 31)):
        vectors = write(path, 200, seed)
        _ = Corpus(
            [], vectors, section(**settings, **{"search.scann.reorder": reorder}), path
        ).index
        (directory,) = tmp_path.glob("a.index-*")
        kept.add(directory.name)
    assert len(kept) == 3


@needs_scann
@pytest.mark.parametrize("how", ["flip", "half"])
def test_a_damaged_index_is_named_and_made_again(tmp_path, caplog, how):
    path = tmp_path / "a.npy"
    vectors = write(path, 200)
    settings = section(**{"search.backend": "scann", "search.scann.method": "ah"})
    expected = Corpus([], vectors, settings, path).index.search(vectors, 5)
    (directory,) = tmp_path.glob("*.index-*")
    if how == "half":  # As if killed while it was saved.
        (directory / "index.json").unlink()
    else:
        content = bytearray((directory / "dataset.npy").read_bytes())
        content[-1] ^= 1
        (directory / "dataset.npy").write_bytes(content)
    found = Corpus([], vectors, settings, path).index.search(vectors, 5)
    np.testing.assert_array_equal(found, expected)
    named = [r.getMessage() for r in caplog.records]
    assert len(named) == (how == "flip")
    assert all("dataset.npy: missing or damaged" in message for message in named)
    search.load_index(directory)


@pytest.mark.parametrize("backend", ["exact", pytest.param("scann", marks=needs_scann)])
def test_what_comes_out_the_same_is_not_kept(tmp_path, backend):
    path = tmp_path / "a.npy"
    vectors = write(path, 30)
    _ = Corpus([], vectors, section(**{"search.backend": backend}), path).index
    assert not list(tmp_path.glob("*.index-*"))


def test_bm25_is_made_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    index = kept_bm25(tmp_path / "new" / "work", TEXTS)
    assert index.size == len(TEXTS)
    with pytest.raises(UserError, match=r"none: cannot write BM25's .* another place by TMPDIR"):
        kept_bm25(tmp_path / "other", TEXTS, write=False)


def test_bm25_is_kept_by_its_texts(tmp_path, no_building):
    corpus = dict(enumerate(TEXTS))
    made = kept_bm25(tmp_path, corpus.values())
    expanded = kept_bm25(tmp_path, [f"{text} more" for text in TEXTS], name="bm25-d2q")
    assert len(list(tmp_path.glob("bm25*.index-*"))) == 2
    no_building()
    for index, texts in ((made, corpus.values()), (expanded, None)):
        name = "bm25" if texts else "bm25-d2q"
        texts = texts or [f"{text} more" for text in TEXTS]
        again = kept_bm25(tmp_path, texts, name=name)
        for ours, theirs in zip(again.search(["cat sat"], 3), index.search(["cat sat"], 3),
                                strict=True):  # fmt: skip
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(AssertionError):
        kept_bm25(tmp_path, TEXTS[:2])


def test_who_only_reads_a_run_writes_nothing(tmp_path):
    index = kept_index(tmp_path / "a-key", lambda: Bm25Index(TEXTS), write=False)
    assert index.size == 3
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_let_go_of_is_opened_when_it_is_asked_for(tmp_path):
    vectors = write(tmp_path / "a.npy", 30)
    corpus = Corpus([], vectors, section(**{"search.backend": "exact"}), tmp_path / "a.npy")
    corpus.release()  # There is none yet.
    first = corpus.index
    assert corpus.index is first
    corpus.release()
    assert corpus.index is not first


RESTART = """
import runpy, sys
from expandr_jax.models.retriever import Retriever
from expandr_jax.search import BACKENDS
from expandr_jax.vectors import corpus, file

def refuse(*_, **__):
    raise AssertionError("an index is opened, vectors read or texts tokenized")

for kind in BACKENDS.values():
    kind.__init__ = kind.load = refuse
corpus.encode_to_file = corpus.open_vectors = file._intact_blocks = refuse
Retriever.token_ids = refuse
runpy.run_module("train.joint", run_name="__main__")
"""


def restart(program, workdir):
    done = subprocess.run(
        [sys.executable, "-c", program, "--config=configs/smoke.py", f"--workdir={workdir}"],
        cwd=ROOT, text=True, capture_output=True, timeout=300,
        env={**os.environ, "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_restart_of_a_finished_run_opens_no_index_and_reads_no_vectors(smoke, tmp_path):
    workdir = shutil.copytree(smoke[0], tmp_path / "run")
    restart(RESTART, workdir)
    assert (workdir / "results.json").read_bytes() == (smoke[0] / "results.json").read_bytes()


MIDWAY = """
import runpy
from expandr_jax.objectives import packed_examples

def refuse(*_, **__):
    raise AssertionError("training texts are tokenized")

packed_examples.triple_examples = refuse
runpy.run_module("train.joint", run_name="__main__")
"""


@pytest.mark.slow
def test_a_restart_after_step_a_tokenizes_none_of_its_texts(smoke, tmp_path):
    workdir = shutil.copytree(smoke[0], tmp_path / "run")
    (workdir / "results.json").unlink()
    restart(MIDWAY, workdir)
    assert (workdir / "results.json").read_bytes() == (smoke[0] / "results.json").read_bytes()
