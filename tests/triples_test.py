"""Triples: what is read, and 200 seeded ways of breaking a line, each named or skipped."""

import gzip
import json

import numpy as np
import pytest

from expandr_jax.data.triples import MAX_CHARACTERS, Triple, read_triples
from expandr_jax.errors import UserError

ROWS = [
    {"query": "one", "pos": "first", "neg": ["second", "third"], "expansion": "a passage"},
    {"query": "two", "pos": ["second", "fourth"]},
    {"query": "three", "positive": "third", "negative": "first"},
    {"query": "four", "pos": ["fourth"], "neg": ["first"], "teacher_scores": [9.5, -1]},
    {"query": "fünf", "pos": ["fifth"], "neg": [], "expansion": ["", "two"], "other": 1},
]
TRIPLES = [
    Triple("one", ("first",), ("second", "third"), ("a passage",)),
    Triple("two", ("second", "fourth")),
    Triple("three", ("third",), ("first",)),
    Triple("four", ("fourth",), ("first",), (), (9.5, -1.0)),
    Triple("fünf", ("fifth",), (), ("two",)),
]
LINES = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]


def test_what_a_file_holds(tmp_path):
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(LINES))  # Blank lines between.
    assert read_triples(tmp_path / "t.jsonl") == (TRIPLES, [])
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b"".join(LINES).rstrip()))
    assert read_triples(tmp_path / "t.jsonl.gz", "skip") == (TRIPLES, [])


UNREAD = (
    "hard_negatives", "hard_neg", "negs", "neg1", "negative 1", "Negative", "neg_docs",
    "positive_texts", "hard_negative_ctxs", "query_prompt", "query_instruction", "margins",
)  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_fields_of_other_programs_are_refused(tmp_path, name):
    (tmp_path / "t.jsonl").write_text(json.dumps({"query": "one", "pos": "first", name: ["x"]}))
    with pytest.raises(UserError, match=f't.jsonl:1: field "{name}" would not be read'):
        read_triples(tmp_path / "t.jsonl")


def test_ids_and_other_words_are_let_through(tmp_path):
    other = ("neg_ids", "positive_id", "position", "negation", "posted", "query_id", "source")
    row = {"query": "one", "pos": "first", **{name: ["x"] for name in other}}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert read_triples(tmp_path / "t.jsonl") == ([Triple("one", ("first",))], [])


WRONG = [None, 3, 1.5, True, {"text": "x"}, [["x"]], [None], ["x", 2]]


def without_field(random, row):
    del row[random.choice([name for name in ("query", "pos", "positive") if name in row])]
    return row


def wrong_type(random, row):
    name = random.choice(["query", "pos", "neg", "expansion", "teacher_scores"])
    row = {key: value for key, value in row.items() if not key.startswith(name)}
    wrong = WRONG if name != "teacher_scores" else [3, "1", {}, ["1", "2"], [True], [1e40]]
    return {**row, name: wrong[random.integers(len(wrong))]}


def empty_text(random, row):
    name = random.choice(["query", "pos", "neg"])
    row = {key: value for key, value in row.items() if not key.startswith(name)}
    texts = ["", " ", "\t\n"] + ([["x", ""], [" "]] if name != "query" else [])
    texts += [[]] if name == "pos" else []
    return {**row, name: texts[random.integers(len(texts))]}


def long_text(random, row):
    return {**row, "pos" if "pos" in row else "positive": "word " * (MAX_CHARACTERS // 5 + 1)}


def other_count(random, row):
    return {**row, "teacher_scores": [1.0] * int(random.integers(4, 9))}


def both_names(random, row):
    return {**row, "pos": "x", "positive": "x"}


def bad_utf8(random, line):
    place = int(random.integers(2, len(line) - 3))
    return line[:place] + bytes([random.integers(0xF8, 0x100)]) + line[place:]


def truncated(random, line):
    return line[: int(random.integers(1, len(line) - 1))]


def not_an_object(random, line):
    return [b"[1]\n", b"null\n", b'"x"\n', b"x\n", b"{}x\n"][random.integers(5)]


OF_ROWS = [without_field, wrong_type, empty_text, long_text, other_count, both_names]
OF_LINES = [bad_utf8, truncated, not_an_object]


@pytest.mark.parametrize("seed", range(200))
def test_a_broken_line_is_named_or_skipped(tmp_path, seed):
    random = np.random.default_rng(seed)
    mutate = (OF_ROWS + OF_LINES)[seed % (len(OF_ROWS) + len(OF_LINES))]
    number = len(LINES) if mutate is truncated else int(random.integers(1, len(LINES) + 1))
    lines = list(LINES)
    if mutate in OF_ROWS:
        row = mutate(random, dict(ROWS[number - 1]))
        lines[number - 1] = json.dumps(row).encode() + b"\n"
    else:
        lines[number - 1] = mutate(random, lines[number - 1])
    path = tmp_path / "triples.jsonl"
    path.write_bytes(b"".join(lines))

    with pytest.raises(UserError) as caught:
        read_triples(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{number}: ")
    assert len(message) < 300
    assert "\n" not in message

    triples, skipped = read_triples(path, on_bad="skip")
    assert skipped == [message]
    assert triples == TRIPLES[: number - 1] + TRIPLES[number:]


@pytest.mark.parametrize(
    "field",
    [
        {"negative_2": "x"}, {"negatives": ["x"]}, {"pos_scores": [1.0]}, {"score": [1.0, 0.0]},
        {"prompt": "Find: "}, {"label": 0}, {"positive_passages": [{"docid": "1", "text": "x"}]},
    ],
)  # fmt: skip
def test_what_other_programs_would_read_is_refused(tmp_path, field):
    path, row = tmp_path / "t.jsonl", {"query": "q", "pos": "p", "neg_ids": ["7"], "type": "x"}
    harmless = {
        "prompt": None, "neg_scores": [], "position": 3, "posted_at": "x", "prompt_id": 7,
        "negative_pids": [1], "possible": "x", "label_id": 1, "underscore": 1,
    }  # fmt: skip
    path.write_text(json.dumps(row | harmless))
    assert read_triples(path) == ([Triple("q", ("p",))], [])
    path.write_text(json.dumps(row | field))
    with pytest.raises(UserError, match=f't.jsonl:1: field "{next(iter(field))}" would not be r'):
        read_triples(path)


def test_files_without_triples(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        read_triples(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no triples"):
        read_triples(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"no triples.*bad\.jsonl:1"):
        read_triples(tmp_path / "bad.jsonl", on_bad="skip")
    with pytest.raises(UserError, match="on_bad"):
        read_triples(tmp_path / "bad.jsonl", on_bad="ignore")


def test_a_file_that_grows_as_no_text_does_is_refused(tmp_path):
    path = tmp_path / "bomb.jsonl.gz"
    line = b'{"query": "q", "pos": "' + b"a" * 500_000 + b'"}\n'
    path.write_bytes(gzip.compress(line * 20))
    with pytest.raises(UserError, match=r"bomb\.jsonl\.gz: .*unpacks to over 100 times its size"):
        read_triples(path)
