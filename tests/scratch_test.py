"""A full disk under files without a name is told in one line, with what helps."""

import contextlib
import errno
import os
import resource

import numpy as np
import pytest
import scipy.sparse

from expandr_jax.data.documents import write_documents
from expandr_jax.errors import UserError
from expandr_jax.objectives.packed_examples import pack_examples
from expandr_jax.objectives.stored_examples import store_examples
from expandr_jax.search import SparseIndex
from expandr_jax.search.word_counts import WordCounts, count_block
from expandr_jax.serving.snapshots import write_snapshot
from tests.contrastive_steps_test import examples


def sparse_index():
    vectors = scipy.sparse.csr_array(np.ones((200, 50), np.float32))
    return SparseIndex([vectors], 50, "key")


def count_words():
    words = np.arange(5000, dtype=np.int32)
    WordCounts().add(count_block(words, np.array([5000])), words)


WRITERS = {
    "step A's examples": lambda: store_examples([pack_examples(examples(40, 150))]),
    "BM25's index": count_words,
    "an index of sparse vectors": sparse_index,
    "it": lambda: write_documents((f"d{i}", "text " * 10) for i in range(5000)),
}


@contextlib.contextmanager
def no_file_above(size):
    """Has the system refuse to write more bytes than this into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("what", WRITERS)
def test_what_does_not_fit_says_where_and_what_helps(tmp_path, monkeypatch, what):
    """Closing such a file fails once more, and not with what helps."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = rf"^{tmp_path}.*: cannot write {what}: .*File too large.*; make room, or .*TMPDIR$"
    with no_file_above(4096), pytest.raises(UserError, match=expected):
        WRITERS[what]()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", WRITERS)
def test_a_place_that_is_not_there_is_told_alike(tmp_path, monkeypatch, what):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    what, write = {"it": "documents"}.get(what, what), WRITERS[what]
    with pytest.raises(UserError, match=f"none: cannot write {what}: No such file .*TMPDIR$"):
        write()


def test_a_snapshot_has_its_room_before_it_is_mapped(tmp_path, monkeypatch):
    """A page that found none later would end the service."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    rows, vectors = [("a", "text")], [np.zeros((1, 4), np.float32)]
    with pytest.raises(OSError, match="No space left"):
        write_snapshot(
            tmp_path, 1, lambda: iter(rows), lambda: iter(vectors), (1, 4), np.dtype(np.float32)
        )
    assert not (tmp_path / "snapshot-1").exists()
