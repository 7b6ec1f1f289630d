"""Files in and beside the BEIR layout that readers of the field understand otherwise."""

import pyarrow.parquet
import pytest

from expandr_jax.data.beir import read_beir, source_hashes
from expandr_jax.data.places import only_collection
from expandr_jax.errors import UserError
from tests.beir_test import make


def test_a_query_is_its_text_alone_as_in_beir_s_own_reader(tmp_path):
    queries = '{"_id": "q1", "title": "T", "text": " how to\\n"}\n{"_id": "q2", "text": "b"}\n'
    collection = read_beir(make(tmp_path / "tiny", queries=queries))
    assert collection.queries == {"q1": " how to\n", "q2": "b"}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("corpus.jsonl.gz", "corpus.jsonl.gz: stands beside corpus.jsonl; remove one"),
        ("queries.jsonl.gz", "queries.jsonl.gz: stands beside queries.jsonl; remove one"),
        ("qrels/test.tsv.gz", "test.tsv.gz: stands beside qrels/test.tsv; remove one"),
        ("qrels/test.trec", "test.trec: stands beside qrels/test.tsv; remove one"),
        ("corpus.parquet", "corpus.parquet: stands beside corpus.jsonl; remove one"),
        ("corpus/corpus/0000.parquet", "0000.parquet: stands beside corpus.jsonl; remove one"),
        ("queries/q.parquet", "queries/q.parquet: stands beside queries.jsonl; remove one"),
        ("topics.tsv", "topics.tsv: stands beside queries.jsonl; remove one"),
        ("qrels/test-00000-of-00001.parquet", "parquet: stands beside qrels/test.tsv; remove one"),
        ("data/test.parquet", "data/test.parquet: stands beside qrels/test.tsv; remove one"),
        ("top_ranked.jsonl", "top_ranked.jsonl: is not supported: queries are ranked against the"),
        ("top_ranked/test-00000-of-00001.parquet", "parquet: is not supported"),
        ("instruction/test-00000-of-00001.parquet", "parquet: is not supported"),
    ],
)
def test_a_file_that_would_not_be_read_is_refused(tmp_path, name, complaint):
    make(tmp_path / "tiny")
    (tmp_path / "tiny" / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / "tiny" / name).touch()
    with pytest.raises(UserError, match=complaint):
        read_beir(tmp_path / "tiny")


def test_tables_beside_lines_of_judgements_are_splits_or_left_alone(tmp_path):
    """A table of documents was taken for a split, and its first row refused."""
    directory, scores = make(tmp_path / "tiny"), ["query-id", "corpus-id", "score"]
    expected = read_beir(directory)
    for name, columns in (("data/pages", ["id", "text"]), ("default/train", scores)):
        path = directory / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir()
        table = pyarrow.table([["q1"], ["d1"], [1]][: len(columns)], columns)
        pyarrow.parquet.write_table(table, path)
    found = read_beir(directory)
    assert found.qrels == {**expected.qrels, "train": {"q1": {"d1": 1}}}
    assert not any("pages" in name for name in source_hashes(only_collection(directory)))
