"""Triples as a run's data: what falls to whom, what leaks, and a whole run with a benchmark."""

import contextlib
import json
import pathlib

import pytest
from rich.console import Console

from configs import echo
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection, read_beir, write_beir
from expandr_jax.data.documents import Documents
from expandr_jax.data.prepared import part_of
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.runtime.run import Run
from tests.commands import command, data_of, finish, start

WORDS = ["array", "gradient", "loss", "norm", "scale", "shape", "step", "count", "mean", "sum"]
NOUNS = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS if len({a, b, c}) == 3]


def passage(noun: str) -> str:
    return f"The {noun} is what a program computes of the {noun[::-1]} before it goes on to others."


# What the README of the paper's code lists.
ECHO_SOURCES = (
    "eli5_question_answer", "fever", "hotpot_qa", "msmarco_document", "msmarco_passage", "nq",
    "squad", "trivia_qa",
)  # fmt: skip


def write_echo(directory: pathlib.Path, count: int = 400) -> pathlib.Path:
    """The eight files, with the names of the paper's, in turn."""
    for k, source in enumerate(ECHO_SOURCES):
        lines = [
            {
                "query": f"what is the {NOUNS[i]} {i % 9}?",
                "positive": passage(NOUNS[i]),
                "negative": passage(NOUNS[(i + 1) % len(NOUNS)]),
            }
            for i in range(k, count, len(ECHO_SOURCES))
        ]
        write_jsonl(directory / f"{source}.jsonl", lines)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_echo(tmp_path_factory.mktemp("data") / "echo-data")


def config_of(source, **changes):
    config = echo.get_config(str(source))
    config.data.shares.update(retriever_train=0.7, generator_train=0.1, dev=0.1, test=0.1)
    config.data.max_retriever_train = config.data.max_generator_train = 0
    config.data.update(changes)
    return config


def prepare(source, workdir, **changes):
    run = Run(workdir, read_config(config_of(source, **changes)), Console(quiet=True))
    try:
        return data_of(run)
    finally:
        run.close()


def rows(source):
    files = sorted(source.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_part_without_a_query_is_a_line(source, tmp_path):
    config = config_of(source)
    config.data.shares.generator_train = 0.0
    message = "no queries to train the generator on; expected a larger data.shares.generator_train"
    run = Run(tmp_path / "run", read_config(config), Console(quiet=True))
    with contextlib.closing(run), pytest.raises(UserError, match=message):
        data_of(run)


def test_every_query_falls_to_its_part(source, tmp_path):
    data = prepare(source, tmp_path / "run")
    shares = config_of(source).data.shares.to_dict()
    collection = data.collection
    assert collection.name == "echo-data"
    parts = {
        "retriever_train": data.queries(data.retriever_train),
        "generator_train": data.queries(data.generator_train),
        "dev": data.queries(list(collection.qrels["dev"])),
        "test": data.queries(list(collection.qrels["test"])),
    }
    for part, queries in parts.items():
        expected = {row["query"] for row in rows(source) if part_of(row["query"], shares) == part}
        assert queries
        assert set(queries) == expected
    assert len(parts["retriever_train"]) > 4 * len(parts["generator_train"])
    by_query = {row["query"]: row for row in rows(source)}
    for query in data.retriever_train:
        row = by_query[collection.queries[query]]
        assert [collection.corpus[d] for d in data.positives(query)] == [row["positive"]]
        assert data.negatives(query) == [row["negative"]]


def test_a_second_run_has_the_same_data_and_reuses_what_is_prepared(source, tmp_path):
    prepared = tmp_path / "prepared"
    first = prepare(source, tmp_path / "a", prepared=str(prepared))
    files = {file: file.stat().st_mtime_ns for file in prepared.rglob("*.array_record*")}
    assert files
    second = prepare(source, tmp_path / "b", prepared=str(prepared))
    assert first == second
    assert {file: file.stat().st_mtime_ns for file in prepared.rglob("*.array_record*")} == files


def test_passages_go_to_the_store_of_documents_one_by_one(source, tmp_path, monkeypatch):
    """No text of the hundreds of thousands is held, and they are written once."""

    def refuse(*_):
        raise AssertionError("the documents are written a second time")

    monkeypatch.setattr("expandr_jax.data.collect.write_documents", refuse)
    corpus = prepare(source, tmp_path / "run").collection.corpus
    assert isinstance(corpus, Documents)
    passages = {text for row in rows(source) for text in (row["positive"], row["negative"])}
    assert {*corpus.values()} <= passages
    assert len({*corpus.values()}) == len(corpus) == len({*corpus})


def test_limits_and_weights(source, tmp_path):
    weights = (("nq", 3.0), ("squad", 1.0))
    data = prepare(source, tmp_path / "a", weights=weights, max_retriever_train=20)
    by_source = {
        name: {
            json.loads(line)["query"]
            for line in (source / f"{name}.jsonl").read_text().splitlines()
        }
        for name in ("nq", "squad")
    }
    queries = data.queries(data.retriever_train)
    assert len(queries) == 20
    assert sum(query in by_source["nq"] for query in queries) == 15
    assert sum(query in by_source["squad"] for query in queries) == 5
    passages = {text for row in rows(source) for text in (row["positive"], row["negative"])}
    assert len(data.collection.corpus) < len(passages) / 2
    with pytest.raises(UserError, match=r"data\.weights: no file of nothing; there are eli5"):
        prepare(source, tmp_path / "b", weights=(("nothing", 1.0),))
    with pytest.raises(UserError, match=r"data\.path is missing"):
        prepare("", tmp_path / "c")


def test_lines_of_one_query_are_one_query(tmp_path):
    source = write_echo(tmp_path / "echo")
    query, right = "which of them?", [passage("first of all"), passage("second of all")]
    wrong = passage("third of all")
    extra = [
        {"query": query, "positive": right[0], "negative": wrong},
        {"query": query, "positive": right[1], "negative": right[0]},
    ]
    write_jsonl(source / "more.jsonl", extra)
    collection = prepare(source, tmp_path / "run").collection
    (judged,) = [
        {collection.corpus[document]: grade for document, grade in grades.items()}
        for split in collection.qrels.values()
        for key, grades in split.items()
        if collection.queries[key] == query
    ]
    assert judged == {right[0]: 1, right[1]: 1, wrong: 0}


def benchmark(directory: pathlib.Path, queries: list[str]) -> pathlib.Path:
    corpus = {f"d{i}": passage(noun) for i, noun in enumerate(NOUNS[-40:])}
    ids = [f"q{i}" for i in range(len(queries))]
    qrels = {"test": {query: {f"d{i}": 1} for i, query in enumerate(ids)}}
    texts = {**dict(zip(ids, queries, strict=True)), "unjudged": "what is the array loss norm 0?"}
    write_beir(directory, Collection(directory.name, corpus, texts, qrels))
    return directory


def test_what_is_tested_is_not_trained_on(tmp_path):
    source = write_echo(tmp_path / "echo")
    shares = config_of(source).data.shares.to_dict()
    plain = prepare(source, tmp_path / "plain")
    trained = plain.queries(plain.retriever_train)
    held_out = plain.collection.qrels["test"]
    (document,) = [d for d, grade in held_out[next(iter(held_out))].items() if grade]
    leak = plain.collection.corpus[document].replace("others", "the others")
    near = next(q for q in (f"near {i}" for i in range(99)) if "train" in part_of(q, shares))
    row = {"query": near, "positive": leak, "negative": passage(NOUNS[0])}
    write_jsonl(source / "leak.jsonl", [row])
    tests = (str(benchmark(tmp_path / "bench", [trained[0].upper(), "another query"])),)
    data = prepare(source, tmp_path / "run", tests=tests)
    left = set(trained) - set(data.queries(data.retriever_train))
    assert left == {trained[0]}
    assert near not in data.collection.queries.values()
    source = json.loads((tmp_path / "run" / "data" / "SOURCE.json").read_text())
    assert (source["left_out"], source["left_out_for_tests"]) == (1, 1)


def test_wrong_tests_are_told_before_anything_is_prepared(source, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such directory"):
        prepare(source, tmp_path / "run", tests=(str(tmp_path / "nowhere"),))
    assert not (tmp_path / "run" / "work").exists()


def test_what_a_collection_tests_is_not_trained_on_either(tmp_path):
    queries = {f"q{i}": f"what is the {noun}?" for i, noun in enumerate(NOUNS[:40])}
    queries["q39"] = queries["q3"].upper().replace("?", " ?!")
    corpus = {f"d{i}": passage(noun) for i, noun in enumerate(NOUNS[:40])}
    qrels = {
        split: {f"q{i}": {f"d{i}": 1} for i in part}
        for split, part in (
            ("train", range(26)), ("dev", range(26, 30)), ("test", range(30, 40)),
        )
    }  # fmt: skip
    write_beir(tmp_path / "set", Collection("set", corpus, queries, qrels))
    data = prepare(tmp_path / "set", tmp_path / "run", kind="beir")
    trained = [*data.retriever_train, *data.generator_train]
    assert sorted(trained) == sorted(f"q{i}" for i in range(26) if i != 3)
    source = json.loads((tmp_path / "run" / "data" / "SOURCE.json").read_text())
    assert source["left_out_for_tests"] == 1


@pytest.mark.slow
def test_a_run_on_triples_is_tested_on_its_own_share_and_on_benchmarks(tmp_path):
    source = write_echo(tmp_path / "echo")
    tests = [str(benchmark(tmp_path / name, [f"the {NOUNS[-40]}?", "x y"])) for name in "ab"]
    workdir = tmp_path / "run"
    overrides = [
        "--config.data.kind=triples", f"--config.data.path={source}", "--config.mining.per_query=0",
        f"--config.data.tests={tuple(tests)!r}",
        "--config.evaluation.systems=('bm25','zero-shot+expansion','expandr','expandr-plain',"
        "'rrf:bm25:expandr','expandr-plain+prf-average','expandr-plain+hyde','bm25+expansion')",
    ]  # fmt: skip
    output = finish(start(workdir, *overrides))
    own = json.loads((workdir / "results.json").read_text())
    assert own["dataset"] == "echo"
    assert not (workdir / "round-0" / "triples.jsonl").exists()
    for name in "ab":
        found = json.loads((workdir / "tests" / name / "results.json").read_text())
        assert [found["dataset"], found["queries"]] == [name, 2]
        assert found["chosen"] == own["chosen"]
        systems = [row["system"] for row in own["rows"]]
        assert [row["system"] for row in found["rows"]] == systems
        for system in systems:
            assert (workdir / "tests" / name / "runs" / f"{system}.trec").exists()
        assert read_beir(tmp_path / name).name == name
    assert json.loads((workdir / "tests" / "mean.json").read_text())["sets"].keys() == {"a", "b"}
    assert "over 2 sets" in output
    # The exported retriever, searched by another program.
    retriever = f"--config.retriever.source={workdir / 'export' / 'retriever'}"
    arguments = ["--config=configs/smoke.py", retriever, "--systems=bm25,dense"]
    arguments += [f"--data={','.join(tests)}", f"--workdir={tmp_path / 'beir'}"]
    finish(command("eval.beir", *arguments))
    for name in "ab":
        found, again = (
            {row["system"]: row for row in json.loads((path / "results.json").read_text())["rows"]}
            for path in (workdir / "tests" / name, tmp_path / "beir" / name)
        )
        assert found["bm25"] == again["bm25"]
        assert found["expandr-plain"] == {**again["dense"], "system": "expandr-plain"}
