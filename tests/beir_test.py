import gzip
import json
import random
import zipfile

import pyarrow
import pyarrow.parquet
import pytest

from expandr_jax.data.answers import holds_answer, normalized_words
from expandr_jax.data.beir import (
    Collection,
    judgements,
    read_beir,
    read_qrels,
    source_hashes,
    write_beir,
)
from expandr_jax.data.benchmarks import check_relevant
from expandr_jax.data.places import find_collections
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


def test_answers_are_read_where_there_are_any_and_written_again(tmp_path):
    queries = (
        '{"_id": "q1", "text": "how to pad", "answers": ["np.pad", "an  Array"]}\n'
        '{"_id": "q2", "text": "a", "answers": []}\n{"_id": "q3", "text": "b", "answers": null}\n'
    )
    collection = read_beir(make(tmp_path / "tiny", queries=queries))
    assert collection.answers == {"q1": ("np.pad", "an  Array")}
    write_beir(tmp_path / "a/tiny", collection)
    assert read_beir(tmp_path / "a/tiny") == collection
    lines = (tmp_path / "a/tiny/queries.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [
        {"_id", "text", "answers"}, {"_id", "text"}, {"_id", "text"}
    ]  # fmt: skip


def test_answers_in_a_text_are_whole_words_in_any_case_and_punctuation():
    text = normalized_words("It was The  Who's: first (U.S.) tour,\nin caf\u00e9s -- 1967!")
    assert text == "it was the whos first us tour in cafés 1967"
    for answer, holds in {
        "the who": False, "THE WHO'S": True, "u.s": True, "tour in": True, "196": False,
        "cafe\u0301s": True,
    }.items():  # fmt: skip
        assert holds_answer(text, ["no such", normalized_words(answer)]) == holds, answer
    assert not holds_answer(text, [])


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
        ({"corpus": '{"_id": "a\\u0000b", "text": "a"}'}, "corpus.jsonl:1: .* and NUL"),
        ({"corpus": '{"_id": "a", "title": 3, "text": "a"}'}, 'corpus.jsonl:1: field "title"'),
        ({"corpus": '{"_id": "a", "text": null}'}, 'corpus.jsonl:1: field "text" is null'),
        ({"corpus": b'{"_id": "a", "text": "\xe9"}'}, "corpus.jsonl:1: not UTF-8"),
        ({"queries": QUERIES + '{"_id": "q3", "text": " "}'}, "queries.jsonl:3: query 'q3' is emp"),
        (
            {"queries": QUERIES + '{"_id": "q3", "text": "a", "answers": "b"}'},
            "queries.jsonl:3: field \"answers\" is 'b'; expected a list of strings",
        ),
        (
            {"queries": QUERIES + '{"_id": "q3", "text": "a", "answers": ["b", 3]}'},
            'queries.jsonl:3: field "answers" has 3; expected strings with a letter or digit',
        ),
        (
            {"queries": QUERIES + '{"_id": "q3", "text": "a", "answers": ["?!"]}'},
            "queries.jsonl:3: field \"answers\" has '\\?!'; expected strings with a letter",
        ),
        ({"qrels": QRELS + "q1 d2 1"}, "test.tsv:4: 1 columns; expected query, document, grade"),
        ({"qrels": QRELS + "q1\t0\td2\t1"}, "test.tsv:4: 4 columns"),
        ({"qrels": QRELS + "q1\td2\t0.5"}, "test.tsv:4: grade '0.5'; expected an integer"),
        ({"qrels": QRELS + "q1\td2\t10000"}, "test.tsv:4: grade '10000'; expected an integer"),
        ({"qrels": QRELS + "q1\td2 \t1"}, "test.tsv:4: id is 'd2 '; expected text without wh"),
        ({"qrels": QRELS + "q1\t\xa0d2\t1"}, "test.tsv:4: id is .* expected text without white"),
        ({"qrels": QRELS + "q9\td2\t1"}, "test.tsv:4: query 'q9' is not among the queries"),
        ({"qrels": QRELS + "q1\td1\t1"}, "test.tsv:4: .* judged otherwise"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "test.tsv: no judgements"),
        (
            {"queries": '{"_id": "q1", "text": "a", "instruction": "b"}'},
            'queries.jsonl:1: field "instruction" is not read',
        ),
        ({"qrels": b"q1\t\xe9\t1"}, "test.tsv:1: not UTF-8"),
    ],
)
def test_mistakes_are_named(tmp_path, files, complaint):
    with pytest.raises(UserError, match=complaint) as caught:
        read_beir(make(tmp_path / "tiny", **files))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("line", ["q1\tD1\t1", "q1\td1\t0"])
def test_judgements_that_no_ranking_can_meet_are_refused(tmp_path, line):
    check_relevant(read_beir(make(tmp_path / "right")), "test")
    collection = read_beir(make(tmp_path / "tiny", qrels=line))
    with pytest.raises(UserError, match="tiny: no test query has a relevant document in the corp"):
        check_relevant(collection, "test")


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        read_beir(tmp_path / "nowhere")


def pack(directory, path):
    """The directory as a zip archive, under its own name as BEIR's archives are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(directory.rglob("*")):
            archive.write(file, file.relative_to(directory.parent))
    return path


def make_parquet(directory, ids="_id", folder="default", kind="float64"):
    """The collection of `make` in the layout of the Hugging Face hub, the corpus in two files."""
    corpus = [json.loads(line) for line in CORPUS.splitlines()]
    queries = [json.loads(line) for line in QUERIES.splitlines()]
    judged = [("q1", "d1", 2), ("q1", '"gone', 0)]
    columns = [
        pyarrow.array([row[i] for row in judged], kind)
        for i, kind in enumerate(("string", "string", kind))
    ]
    tables = {
        "queries/queries-00000-of-00001": texts(queries, ids),
        f"{folder}/test-00000-of-00001": pyarrow.table(columns, ["query-id", "corpus-id", "score"]),
    }
    for number, row in enumerate(corpus):
        tables[f"corpus/corpus-0000{number}-of-00002"] = texts([row], ids)
    for name, table in tables.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, directory / f"{name}.parquet")
    return directory


def texts(rows, ids):
    columns = {ids: [row["_id"] for row in rows]}
    columns |= {name: [row.get(name) for row in rows] for name in ("title", "text")}
    return pyarrow.table({k: pyarrow.array(v, pyarrow.string()) for k, v in columns.items()})


def test_a_zip_is_read_as_its_directory(tmp_path):
    directory = make(tmp_path / "tiny")
    path = pack(directory, tmp_path / "archive.zip")
    assert read_beir(path) == read_beir(directory)
    assert list(find_collections(path)) == ["tiny"]
    assert list(source_hashes(find_collections(path)["tiny"])) == ["archive.zip"]


def test_everything_may_be_compressed(tmp_path):
    directory = make(tmp_path / "tiny")
    expected = read_beir(directory)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = directory / name
        (directory / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_beir(directory) == expected
    assert read_beir(pack(directory, tmp_path / "archive.zip")) == expected
    assert read_qrels(directory / "qrels/test.tsv.gz") == expected.qrels["test"]
    names = ["corpus.jsonl.gz", "queries.jsonl.gz", "qrels/test.tsv.gz"]
    assert list(source_hashes(find_collections(directory)["tiny"])) == names


@pytest.mark.parametrize(
    ("ids", "folder", "kind"),
    [("_id", "default", "float64"), ("id", "qrels", "int64")],
)
def test_parquet_tables_as_on_the_hub(tmp_path, ids, folder, kind):
    expected = read_beir(make(tmp_path / "jsonl" / "tiny"))
    directory = make_parquet(tmp_path / "tiny", ids, folder, kind)
    assert read_beir(directory) == expected
    assert len(source_hashes(find_collections(directory)["tiny"])) == 4
    path = directory / folder / "test-00000-of-00001.parquet"
    assert read_qrels(path) == expected.qrels["test"]


def test_the_hub_s_own_conversion_to_parquet(tmp_path):
    expected = read_beir(make(tmp_path / "jsonl" / "tiny"))
    directory = make_parquet(tmp_path / "tiny")
    for kind, split in (("corpus", "corpus"), ("queries", "queries"), ("default", "test")):
        (directory / kind / split).mkdir()
        for number, path in enumerate(sorted((directory / kind).glob("*.parquet"))):
            path.rename(directory / kind / split / f"{number:04}.parquet")
    assert read_beir(directory) == expected


def test_mistakes_in_parquet_are_named(tmp_path):
    directory = make_parquet(tmp_path / "tiny")
    path = directory / "queries" / "queries-00000-of-00001.parquet"
    for columns, complaint in (
        ({"_id": ["q1", "q1"], "text": ["a", "b"]}, "parquet: row 2: .* appears a second time"),
        ({"_id": [1, 2], "text": ["a", "b"]}, 'row 1: field "_id" is an integer'),
        ({"_id": ["q1"], "text": [b"a"]}, "column 'text' is binary; expected text"),
        ({"text": ["a"]}, 'row 1: field "_id" is null'),
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        with pytest.raises(UserError, match=complaint):
            read_beir(directory)
    scores = directory / "default" / "test-00000-of-00001.parquet"
    table = pyarrow.table({"query-id": ["q1"], "corpus-id": ["d1"], "score": [0.5]})
    pyarrow.parquet.write_table(table, scores)
    with pytest.raises(UserError, match=r"row 1: grade 0.5; expected an integer"):
        read_qrels(scores)


def test_trec_topics_and_judgements(tmp_path):
    directory = make(tmp_path / "tiny", queries=None, qrels=None)
    topics = "<top>\n<num> Number: q1\n<title> how to pad\n</top>\n"
    (directory / "topics.txt").write_text(topics)
    (directory / "qrels" / "test.trec").write_text('q1 0 d1 2\nq1 Q0 "gone 0\n')
    found = read_beir(directory)
    assert found.queries == {"q1": "how to pad"}
    assert found.qrels == {"test": {"q1": {"d1": 2, '"gone': 0}}}
    assert read_qrels(directory / "qrels" / "test.trec") == found.qrels["test"]
    (directory / "qrels" / "test.trec").write_text("q1 0 d1 2\nq1 d2 1\n")
    with pytest.raises(UserError, match=r"test\.trec:2: 3 columns; expected query, 0, document"):
        read_beir(directory)


def test_several_collections_are_found_by_name(tmp_path):
    for name in ("android", "english"):
        make(tmp_path / "cqadupstack" / name)
    path = pack(tmp_path / "cqadupstack", tmp_path / "cqadupstack.zip")
    for place in (tmp_path / "cqadupstack", path):
        found = find_collections(place)
        assert list(found) == ["cqadupstack/android", "cqadupstack/english"]
        assert read_beir(found["cqadupstack/english"]).name == "english"
        with pytest.raises(UserError, match="holds 2 collections; name one: cqadupstack/android"):
            read_beir(place)
    make(tmp_path / "cqadupstack" / "more" / "cqadupstack" / "android")
    with pytest.raises(UserError, match="two of its collections are called 'cqadupstack/android'"):
        find_collections(tmp_path / "cqadupstack")


def test_a_folder_of_sets_is_no_family(tmp_path):
    for name in ("fiqa", "scifact", "cqadupstack/android", "cqadupstack/english"):
        make(tmp_path / "beir" / name)
    path = pack(tmp_path / "beir", tmp_path / "archive.zip")
    names = ["cqadupstack/android", "cqadupstack/english", "fiqa", "scifact"]
    for place in (tmp_path / "beir", path):
        found = find_collections(place)
        assert list(found) == names
        assert read_beir(found["cqadupstack/english"]).name == "english"
        assert all(read_beir(files).qrels["test"] for files in found.values())
    make(tmp_path / "beir" / "old" / "fiqa")
    with pytest.raises(UserError, match="beir: two of its collections are called 'fiqa'"):
        find_collections(tmp_path / "beir")


def test_every_mistake_can_be_reported(tmp_path):
    queries = QUERIES + "[]\n" + '{"_id": "q3", "text": ""}\n'
    qrels = QRELS + "q1\td2\nq9\td2\t1\nq1\td2\t3\n"
    directory = make(tmp_path / "tiny", queries=queries, qrels=qrels)
    mistakes = []
    found = read_beir(directory, mistakes)
    lines = [str(mistake).removeprefix(f"{directory}/") for mistake in mistakes]
    assert [line.split(": ")[0] for line in lines] == [
        "queries.jsonl:3", "queries.jsonl:4", "qrels/test.tsv:4", "qrels/test.tsv:5",
    ]  # fmt: skip
    assert found.queries == {"q1": "how to pad", "q2": "unjudged"}
    assert found.qrels["test"]["q1"] == {"d1": 2, '"gone': 0, "d2": 3}


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"corpus": b'{"_id": "d1", "text": "caf\xe9"}\n[]\n'}, "corpus.jsonl:1: not UTF-8"),
        ({"qrels": "q9\td1\t1\nq8\td1\t1\n"}, "test.tsv:1: query 'q9' is not among"),
    ],
)
def test_where_every_line_is_wrong_the_first_is_named(tmp_path, files, complaint):
    mistakes = []
    with pytest.raises(UserError, match=complaint):
        read_beir(make(tmp_path / "tiny", **files), mistakes)
    assert len(mistakes) == 2


def test_judgements_say_where_they_stand(tmp_path):
    directory = make(tmp_path / "tiny")
    files = find_collections(directory)["tiny"]
    assert [tuple(row) for row in judgements(files, "test")] == [
        (f"{directory}/qrels/test.tsv:2", "q1", "d1", 2),
        (f"{directory}/qrels/test.tsv:3", "q1", '"gone', 0),
    ]
    with pytest.raises(UserError, match="no judgements of split 'dev'; there are test"):
        list(judgements(files, "dev"))


def mutate(data, rng):
    """One change such as disks, editors and transfers make."""
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 20))
    junk = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 4)))
    return rng.choice(
        [
            data[:start],
            data[:start] + data[end:],
            data[:start] + junk + data[start:],
            data[:start] + junk + data[start + len(junk) :],
            data[:end] + data[start:],
        ]
    )


def refusal(read, source):
    """What a reader complains of, or "" if it returns something."""
    try:
        assert read(source)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["jsonl", "gzip", "zip", "parquet"])
def test_200_mutations_end_in_one_line_or_a_collection(tmp_path, layout):
    source = (make_parquet if layout == "parquet" else make)(tmp_path / "tiny")
    if layout == "gzip":
        for path in [*source.glob("*.jsonl")]:
            (source / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    elif layout == "zip":
        source = pack(source, tmp_path / "tiny.zip")
    files = sorted(p for p in source.rglob("*") if p.is_file()) or [source]
    rng = random.Random(layout)
    refused = 0
    for _ in range(200):
        path = rng.choice(files)
        data = path.read_bytes()
        path.write_bytes(mutate(data, rng))
        refused += bool(complaint := refusal(read_beir, source))
        assert "\n" not in complaint
        assert not complaint or str(tmp_path) in complaint
        path.write_bytes(data)
    assert refused > 60  # a changed word, say, is still a collection
