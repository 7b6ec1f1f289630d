import gc
import json
import logging
import os
import pickle
import subprocess
import sys
import tracemalloc

import pyarrow
import pytest

from expandr_jax.data import beir
from expandr_jax.data.beir import read_beir
from expandr_jax.data.documents import (
    ROWS_AT_ONCE,
    Documents,
    ids_of,
    open_documents,
    rows_of,
    seal,
    texts_of,
    write_documents,
)
from expandr_jax.errors import UserError


def synthetic(count):
    return ((f"d{i}", f"Text of document {i}. " * 8) for i in range(count))


def test_a_store_is_the_mapping_that_it_was_written_from(tmp_path):
    expected = {f"é{i}": "ß" * (i % 5) for i in range(ROWS_AT_ONCE + 3)}
    documents = write_documents(expected.items(), tmp_path / "store")
    assert documents == expected
    assert expected == documents
    assert list(documents) == list(ids_of(documents)) == list(expected) == ids_of(expected)
    assert list(texts_of(documents)) == list(documents.values()) == texts_of(expected)
    assert list(documents.items()) == list(expected.items())
    assert len(documents) == len(documents.values()) == ROWS_AT_ONCE + 3
    assert "é1" in documents
    assert documents.get("gone", "no") == "no"
    assert "d" not in documents
    assert 1 not in documents
    assert rows_of(documents) == rows_of(expected)
    texts, plain = documents.texts, texts_of(expected)
    assert texts[-1] == plain[-1]
    for part in (
        slice(2, ROWS_AT_ONCE + 2),
        slice(None, None, 1000),
        slice(ROWS_AT_ONCE, None),
        slice(5, 5),
    ):
        assert list(texts[part]) == plain[part]
        assert list(texts[part][1:]) == plain[part][1:]
    assert pickle.loads(pickle.dumps(documents)) == expected
    assert write_documents([]) == {}


def test_ids_that_stand_twice_are_found():
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("a", "5"), ("c", "6")]
    assert write_documents(rows).repeated() == {"a", "c"}
    assert not write_documents(rows[:2]).repeated()


def test_what_a_store_holds_in_memory_does_not_grow(tmp_path):
    """And making it takes 40 bytes a document, besides the batch that is being written."""
    made, read, held = [], [], []
    pool = pyarrow.default_memory_pool()
    for count in (2 * ROWS_AT_ONCE, 8 * ROWS_AT_ONCE, 32 * ROWS_AT_ONCE):
        gc.collect()
        before = pool.bytes_allocated()
        tracemalloc.start()
        documents = write_documents(synthetic(count), tmp_path / str(count))
        made.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.clear_traces()
        for key in ("d0", f"d{count // 2}", f"d{count - 1}"):
            assert documents[key].startswith(f"Text of document {key[1:]}. ")
        assert sum(map(len, documents.texts)) > 100 * count
        assert all(key in documents for key in documents.ids[::100])
        read.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        held.append(pool.bytes_allocated() - before)
    assert max(made) - made[0] < 45 * 32 * ROWS_AT_ONCE
    assert max(read) < 1.1 * read[0] + 1e5
    assert max(held) < 1e6


def test_a_store_is_whole_or_not_there(tmp_path, caplog):
    store = tmp_path / "store"
    assert open_documents(store, "key") is None
    first = write_documents(synthetic(3), store)
    assert open_documents(store, "key") is None, "not sealed"
    seal(store, "key")
    assert open_documents(store, "key") == dict(synthetic(3))
    assert open_documents(store, "other") is None

    def broken():
        yield from synthetic(2)
        raise UserError("FILE:3: wrong")

    with pytest.raises(UserError, match="FILE:3: wrong"):
        write_documents(broken(), store)
    assert sorted(os.listdir(store)) == ["documents.arrow", "ids.npy"], "of the one before"
    assert open_documents(store, "key") is None
    assert write_documents(synthetic(5), store) == dict(synthetic(5))
    assert first == dict(synthetic(3)), "what is open stays readable"
    seal(store, "key")
    with open(store / "documents.arrow", "r+b") as file:
        file.seek(100)
        file.write(b"damage")
    with caplog.at_level(logging.WARNING):
        assert open_documents(store, "key") is None
    assert f"{store}: is damaged; it is made again" in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/store: cannot write it"):
        write_documents([], tmp_path / "file" / "store")


def test_a_temporary_store_goes_with_its_documents():
    documents = write_documents(synthetic(3))
    directory = documents.directory
    assert os.listdir(directory)
    del documents
    gc.collect()
    assert not directory.exists()


def test_a_collection_is_read_once(tmp_path, monkeypatch):
    data, store = tmp_path / "data", tmp_path / "store"
    (data / "qrels").mkdir(parents=True)
    rows = [{"_id": key, "title": "", "text": text} for key, text in synthetic(3)]

    def write():
        (data / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write()
    (data / "queries.jsonl").write_text('{"_id": "q", "text": "what?"}\n')
    (data / "qrels" / "test.tsv").write_text("q\td1\t1\n")
    read = beir.read_texts
    kinds = []
    monkeypatch.setattr(beir, "read_texts", lambda *a, **k: kinds.append(a[1]) or read(*a, **k))
    first = read_beir(data, store=store)
    assert isinstance(first.corpus, Documents)
    assert kinds == ["corpus", "queries"]
    assert read_beir(data, store=store) == first == read_beir(data)
    assert kinds == ["corpus", "queries", "queries", "corpus", "queries"]
    rows[1]["text"] = "Another text."
    write()
    assert read_beir(data, store=store).corpus["d1"] == "Another text."


CHILD = """
import sys
from expandr_jax.data.documents import ROWS_AT_ONCE, Documents, write_documents

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024

def rows(count):
    for i in range(count):
        if i % (16 * ROWS_AT_ONCE) == 0:
            peaks.append(anonymous())
        yield f"d{i}", f"Text of document {i}. " * 16

count, peaks = int(sys.argv[1]), []
write_documents(rows(2 * ROWS_AT_ONCE), sys.argv[2])
start = anonymous()
documents = write_documents(rows(count), sys.argv[2])
written = max(peaks) - start
peaks.clear()
for row, text in enumerate(documents.values()):
    if row % (16 * ROWS_AT_ONCE) == 0:
        assert documents[f"d{row}"] == text
        peaks.append(anonymous())
print(written, max(peaks) - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux tells it")
def test_a_million_documents_take_no_more_memory_than_ten_thousand(tmp_path):
    """In MB, beyond what a store of 8,192 took: at most while it is written, and read."""
    found = {}
    for count in (10_000, 100_000, 1_000_000):
        arguments = [sys.executable, "-c", CHILD, str(count), str(tmp_path / str(count))]
        output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
        found[count] = [float(number) for number in output.split()]
        print(f"{count:,} documents: {output.strip()}")
    assert found[1_000_000][0] - found[10_000][0] < 40
    assert found[1_000_000][1] - found[10_000][1] < 8
