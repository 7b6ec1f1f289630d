import gzip
import json

import pytest

from expandr_jax.data.beir import Collection, read_beir, write_beir
from expandr_jax.errors import UserError

CORPUS = '{"_id": "d1", "title": "Pad", "text": "an array "}\n{"_id": "d2", "text": ""}\n'
QUERIES = '{"_id": "q1", "text": "how to pad"}\n{"_id": "q2", "text": "unjudged"}\n'
QRELS = 'query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\t"gone\t0\n'


def make(directory, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (directory / "qrels").mkdir(parents=True)
    for name, text in {
        "corpus.jsonl": corpus,
        "queries.jsonl": queries,
        "qrels/test.tsv": qrels,
    }.items():
        if text is not None:
            (directory / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


def test_read(tmp_path):
    collection = read_beir(make(tmp_path / "tiny"))
    assert collection == Collection(
        name="tiny",
        corpus={"d1": "Pad an array", "d2": ""},
        queries={"q1": "how to pad", "q2": "unjudged"},
        qrels={"test": {"q1": {"d1": 2, '"gone': 0}}},
    )


def test_header_is_optional_and_line_ends_may_be_windows(tmp_path):
    directory = make(tmp_path / "tiny", qrels="\ufeffq1\td1\t1\r\n\r\nq1\td1\t1\r\n")
    assert read_beir(directory).qrels == {"test": {"q1": {"d1": 1}}}


def test_compressed_corpus(tmp_path):
    directory = make(tmp_path / "tiny", corpus=None)
    (directory / "corpus.jsonl.gz").write_bytes(gzip.compress(CORPUS.encode()))
    assert list(read_beir(directory).corpus) == ["d1", "d2"]


def test_what_is_written_is_read_again(tmp_path):
    collection = read_beir(make(tmp_path / "tiny"))
    for copy in ("a/tiny", "b/tiny"):
        write_beir(tmp_path / copy, collection)
        assert read_beir(tmp_path / copy) == collection
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        assert (tmp_path / "a/tiny" / name).read_bytes() == (
            tmp_path / "b/tiny" / name
        ).read_bytes()
    first = json.loads((tmp_path / "a/tiny/corpus.jsonl").read_text().splitlines()[0])
    assert first == {"_id": "d1", "title": "", "text": "Pad an array"}
    assert (tmp_path / "a/tiny/qrels/test.tsv").read_text() == QRELS


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"corpus": None}, "corpus.jsonl: cannot read it: No such file"),
        ({"queries": None}, "queries.jsonl: cannot read it: No such file"),
        ({"qrels": None}, "qrels: no .tsv file"),
        ({"corpus": ""}, "corpus.jsonl: empty"),
        ({"corpus": CORPUS + "{"}, "corpus.jsonl:3: not JSON"),
        ({"corpus": CORPUS + CORPUS}, "corpus.jsonl:3: .*'d1' appears a second time"),
        ({"corpus": '{"_id": "", "text": "a"}'}, "corpus.jsonl:1: .*without white space"),
        ({"corpus": '{"_id": "a b", "text": "a"}'}, "corpus.jsonl:1: .*without white space"),
        ({"corpus": '{"_id": "a", "title": 3, "text": "a"}'}, 'corpus.jsonl:1: field "title"'),
        ({"corpus": '{"_id": "a", "text": null}'}, 'corpus.jsonl:1: field "text" is null'),
        ({"corpus": b'{"_id": "a", "text": "\xe9"}'}, "corpus.jsonl:1: not UTF-8"),
        ({"queries": QUERIES + '{"_id": "q3", "text": " "}'}, "queries.jsonl:3: query 'q3' is emp"),
        ({"qrels": QRELS + "q1 d2 1"}, "test.tsv:4: 1 columns; expected query, document, grade"),
        ({"qrels": QRELS + "q1\t0\td2\t1"}, "test.tsv:4: 4 columns"),
        ({"qrels": QRELS + "q1\td2\t0.5"}, "test.tsv:4: grade '0.5'; expected an integer"),
        ({"qrels": QRELS + "q9\td2\t1"}, "test.tsv:4: query 'q9' is not among the queries"),
        ({"qrels": QRELS + "q1\td1\t1"}, "test.tsv:4: .* judged otherwise"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "test.tsv: no judgements"),
        ({"qrels": b"q1\t\xe9\t1"}, "test.tsv: not UTF-8"),
    ],
)
def test_mistakes_are_named(tmp_path, files, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        read_beir(make(tmp_path / "tiny", **files))
    assert str(tmp_path) in str(caught.value)


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        read_beir(tmp_path / "nowhere")
