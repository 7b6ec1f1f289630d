"""`eval.data` on a data set that has something of everything wrong with it."""

import json

import pytest
from rich.console import Console

from eval.data import check, find_warnings
from eval.description import token_lengths, word_lengths
from expandr_jax.data.beir import read_beir
from expandr_jax.data.places import find_collections
from expandr_jax.errors import UserError
from tests.commands import ROOT, command, finish

LONG = [f"word{i}" for i in range(30)]
CORPUS = {
    "d1": " ".join(LONG),
    "d2": " ".join([*LONG[:26], "other"]),  # 22 of its 23 5-grams are d1's: 22 / 27 in common
    "d3": "shared by both splits",
    "d4": "Shared, by both splits!",
    "d5": "",
    "same": "a query that is a document",
}
QUERIES = {
    "q1": "train query",
    "q2": "Train query.",
    "q3": "never judged",
    "same": "a query that is a document",
}
QRELS = {
    "train": [("q1", "d1", 1), ("q1", "d3", 2)],
    "test": [("q2", "d2", 1), ("q2", "gone", 1), ("same", "d3", 1), ("same", "d4", 0)],
}


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "set"
    (path / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        rows = [{"_id": key, "text": text} for key, text in texts.items()]
        if name == "corpus":
            rows[-1]["title"] = "its title"
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, rows in QRELS.items():
        lines = ("\t".join(map(str, row)) + "\n" for row in rows)
        (path / "qrels" / f"{split}.tsv").write_text("".join(lines))
    return path


def warnings(directory, near=0.5):
    files = next(iter(find_collections(directory).values()))
    return find_warnings(read_beir(files), files, near)


def test_everything_that_deserves_a_look(directory):
    assert warnings(directory) == [
        "1 documents repeat the text of another: d4",
        "1 queries repeat the text of another: q2",
        "1 queries are the text of the document with their own id "
        "(drop_identical_ids is for them): same",
        "1 queries have no judgement in any split: q3",
        "1 test judgements are of documents that the corpus lacks: "
        f"{directory}/qrels/test.tsv:2 gone",
        "1 test queries are train queries word for word: q2",
        "1 relevant test documents are relevant train documents: d3",
        "1 relevant test documents share over 0.5 of their 5-grams with a train document: "
        "d2 with d1",
    ]


def test_near_is_the_share_that_near_duplicates_exceed(directory):
    for near, found in ((0.81, True), (0.82, False)):  # 22 / 27 is 0.815
        assert any("d2 with d1" in line for line in warnings(directory, near)) is found


def test_the_ends_of_a_chain_are_no_near_duplicates(directory):
    # d1 and the middle, the middle and d2 have 0.5 and more in common; d1 and d2 do not.
    texts = [" ".join(f"word{i}" for i in range(start, start + 20)) for start in (0, 5, 10)]
    rows = [{"_id": key, "text": text} for key, text in zip(("d1", "m", "d2"), texts, strict=True)]
    (directory / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "qrels" / "train.tsv").write_text("q1\td1\t1\n")
    (directory / "qrels" / "test.tsv").write_text("q3\tm\t1\nq3\td2\t1\n")
    assert [line for line in warnings(directory, 0.4) if "5-grams" in line] == [
        "1 relevant test documents share over 0.4 of their 5-grams with a train document: m with d1"
    ]


def test_counts_and_lengths(directory):
    console = Console(width=200, record=True)
    assert check(directory, word_lengths(), 0.5, console) == 0
    lines = [[c.strip() for c in line.split("│")] for line in console.export_text().splitlines()]
    rows = {row[1]: row[2:-1] for row in lines if len(row) > 2}
    # Words: 30, 27, 4, 4, 0 and 8; then 2, 2, 2 and 6.
    assert rows["corpus"] == ["6", "1", "12.2", "6", "29", "30"]
    assert rows["queries"] == ["4", "0", "3.0", "2", "5", "6"]
    assert rows["train"] == ["1", "2", "2.00", "2"]
    assert rows["test"] == ["2", "4", "1.50", "1"]


def test_tokens_are_the_retriever_s():
    lengths = token_lengths(str(ROOT / "configs" / "tiny" / "tiny-bert"))
    assert (lengths.unit, lengths.limit) == ("tokens", 64)
    assert lengths.of(["", "( (", "a b c " * 100])[:2] == [2, 4]  # [CLS] and [SEP] count
    assert lengths.of(["a b c " * 100]) > [64]  # what would be cut is counted too


def test_mistakes_are_listed_with_their_lines_and_end_in_status_2(directory):
    with open(directory / "queries.jsonl", "a") as file:
        file.write('{"_id": "q1", "text": "again"}\n{"_id": "q9"}\n')
    with open(directory / "qrels" / "test.tsv", "a") as file:
        file.write("q8\td1\t1\n")
    process = command("eval.data", str(directory))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    for complaint in (
        "queries.jsonl:5: \"_id\" 'q1' appears a second time",
        'queries.jsonl:6: no field "text"',
        "test.tsv:5: query 'q8' is not among the queries",
        "3 lines are wrong",
    ):
        assert complaint in output
    assert "warning: 1 queries have no judgement" in output
    assert "Traceback" not in output


def test_warnings_alone_end_in_status_0(directory):
    retriever = f"--retriever={ROOT / 'configs' / 'tiny' / 'tiny-bert'}"
    output = finish(command("eval.data", str(directory), retriever))
    assert "over the limit" in output
    assert "word for word" in output


TRIPLES = {
    "nq": [
        {"query": "train query", "positive": CORPUS["d1"], "negative": "x y"},
        {"query": "Train  query?", "positive": "a b c", "negative": ["a b c", "x"]},
        {"query": "word for word", "positive": "p"},
    ],
    "squad": [{"query": "QUERY, judged", "positive": ["p", "q r"], "negative": "n"}],
}


def write_triples(directory, triples=TRIPLES):
    directory.mkdir()
    for source, rows in triples.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{source}.jsonl").write_text(text)
    return directory


def test_triples_and_what_of_test_sets_is_in_them(directory, tmp_path):
    (directory / "qrels" / "test.tsv").write_text("q2\td2\t1\nq3\td5\t0\n")
    queries = {"q2": "query: judged", "q3": "Word for word"}
    lines = (json.dumps({"_id": key, "text": text}) + "\n" for key, text in queries.items())
    (directory / "queries.jsonl").write_text("".join(lines))
    (directory / "qrels" / "train.tsv").unlink()
    console = Console(width=200, record=True)
    path = write_triples(tmp_path / "echo")
    assert check(path, word_lengths(), 0.5, console, [str(directory)]) == 0
    output = console.export_text().splitlines()
    lines = [[c.strip() for c in line.split("│")][1:-1] for line in output if "│" in line]
    assert lines[:3] == [
        ["nq", "queries", "3", "2.3", "2", "3", "3"],  # 2, 2 and 3 words
        ["", "positives", "3", "11.3", "3", "27", "30"],  # 30, 3 and 1
        ["", "negatives", "3", "2.0", "2", "3", "3"],  # 2, 3 and 1
    ]
    assert [line for line in output if line.startswith("warning")] == [
        "warning: 1 lines have a positive that shares over 0.5 of its 5-grams with a relevant test "
        "document: nq: train query",
        "warning: 1 lines repeat the query of another: nq: Train  query?",
        "warning: 1 lines have a positive among their negatives: nq: Train  query?",
        "warning: 1 lines have no negative: nq: word for word",
        "warning: 2 lines have a test query, word for word: nq: word for word, "
        "squad: QUERY, judged",
    ]
    console = Console(width=200, record=True)
    assert check(path, word_lengths(), 0.5, console) == 0  # Without tests.
    assert "test" not in console.export_text()


def test_mistakes_in_triples_end_in_status_2(directory, tmp_path):
    path = write_triples(tmp_path / "echo", {"nq": [*TRIPLES["nq"], {"query": "q"}, []]})
    for place in (path, path / "nq.jsonl"):
        process = command("eval.data", str(place))
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        assert "nq.jsonl:4: no positive" in output
        assert "nq.jsonl:5: found an array; expected a JSON object" in output
        assert "2 lines are wrong" in output
        assert "Traceback" not in output
    (path / "nq.jsonl").write_text("\n")
    with pytest.raises(UserError, match=f"{path}: no triples"):
        check(path, word_lengths(), 0.5, Console(quiet=True))
    with pytest.raises(UserError, match=f"--tests goes with triples, and {directory} has none"):
        check(directory, word_lengths(), 0.5, Console(quiet=True), [str(directory)])
    (directory / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"corpus\.jsonl: cannot read it"):
        check(directory, word_lengths(), 0.5, Console(quiet=True))
