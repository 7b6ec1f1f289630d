"""BRIGHT's layout, and its excluded documents, which no ranking has."""

import gzip
import json
import math
import random

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from configs import bright as bright_config
from configs import smoke
from eval.beir import evaluate_beir
from expandr_jax.data.beir import read_beir, source_hashes, write_beir
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.data.places import find_collections
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import make_expander
from expandr_jax.expansion.strategies import Search
from expandr_jax.metrics import read_trec
from expandr_jax.ranking.rerank import RERANKERS, Reranker
from expandr_jax.ranking.systems import parse_system
from expandr_jax.search import Bm25Index
from tests.beir_test import mutate
from tests.commands import command
from tests.mutations_test import check_complaint, spoil_json
from tests.ranker_test import CORPUS, QUERIES, ranker

# By BM25, "moth" finds the shorter text first: a b, c, d, e. The query's own page and one that is
# much like it are left out.
DOCUMENTS = {
    "lamp/a b.txt": "moth", "lamp/c.txt": "moth lamp", "lamp/d.txt": "moth lamp night",
    "e": "moth lamp night sky", "f": "river stone", "g": "river",
}  # fmt: skip
EXAMPLES = [
    {"id": "0", "query": "moth", "reasoning": "-", "excluded_ids": ["lamp/a b.txt", "lamp/c.txt"],
     "gold_ids": ["e", "lamp/gone.txt"], "gold_ids_long": ["page"]},
    {"id": "1", "query": "stone?\n\nA river.", "reasoning": "-", "excluded_ids": ["N/A"],
     "gold_ids": ["f", "f"], "gold_ids_long": ["N/A"]},
    {"id": "2", "query": "nobody knows", "reasoning": "-", "excluded_ids": ["N/A"],
     "gold_ids": [], "gold_ids_long": ["other"]},
]  # fmt: skip
PAGES = {"page": "moth lamp", "other": "river stone"}


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)


def make(directory, end="-00000-of-00001.parquet", examples=EXAMPLES, documents=DOCUMENTS):
    rows = [{"id": key, "content": text} for key, text in documents.items()]
    write_rows(directory / "examples" / f"biology{end}", examples)
    write_rows(directory / "documents" / f"biology{end}", rows)
    rows = [{"id": key, "content": text} for key, text in PAGES.items()]
    write_rows(directory / "long_documents" / f"biology{end}", rows)
    write_rows(directory / "examples" / f"pony{end}", examples[1:2])
    write_rows(directory / "documents" / f"pony{end}", [{"id": "f", "content": "river stone"}])
    return directory


@pytest.mark.parametrize("end", ["-00000-of-00001.parquet", "/0000.parquet", ".jsonl", ".jsonl.gz"])
def test_a_task_is_a_collection(tmp_path, end):
    make(tmp_path / "hub", end)
    write_rows(tmp_path / "hub" / "gpt4_reason" / f"biology{end}", EXAMPLES)
    tasks = find_collections(tmp_path / "hub")
    assert list(tasks) == ["biology", "pony"]
    found = read_beir(tasks["biology"], store=tmp_path / "store")
    assert found == read_beir(tasks["biology"], store=tmp_path / "store")  # As it is kept.
    assert found.name == "biology"
    assert dict(found.corpus) == {key.replace(" ", "_"): text for key, text in DOCUMENTS.items()}
    assert found.queries == {row["id"]: row["query"] for row in EXAMPLES}
    assert found.qrels == {"test": {"0": {"e": 1, "lamp/gone.txt": 1}, "1": {"f": 1}}}
    assert found.excluded == {"0": ("lamp/a_b.txt", "lamp/c.txt")}
    assert len(source_hashes(tasks["biology"])) == 2
    (name, files), *rest = find_collections(f"{tmp_path / 'hub'}:long").items()
    assert (name, rest) == ("biology-long", [])
    pages = read_beir(files)
    assert (pages.name, dict(pages.corpus)) == (name, PAGES)
    assert pages.qrels == {"test": {"0": {"page": 1}, "2": {"other": 1}}}
    for chosen in ("pony", "biology-long"):
        assert list(find_benchmarks([f"{tmp_path / 'hub'}:{chosen}"])) == [chosen]


def test_excluded_documents_are_kept_where_a_collection_is_written(tmp_path):
    files = find_collections(make(tmp_path / "hub"))["biology"]
    write_beir(tmp_path / "data", read_beir(files))
    again = read_beir(tmp_path / "data")
    assert again.excluded == {"0": ("lamp/a_b.txt", "lamp/c.txt")}
    assert again.queries == read_beir(files).queries


def test_documents_leave_a_ranking_before_it_is_cut(tmp_path):
    """At two documents, "moth" finds d and e: the one that is relevant comes second."""
    config = bright_config.get_config(str(make(tmp_path / "hub")))
    config.evaluation.update({"depth": 2, "query_weights": (0.5,), "samples": (1,)})
    made = evaluate_beir(
        config, tmp_path / "out", [], ["bm25", "bm25q"], "", Console(quiet=True), ["Success@1"]
    )
    assert list(made) == ["biology", "pony"]
    run = read_trec(tmp_path / "out" / "biology" / "runs" / "bm25.trec")
    assert {query: list(found) for query, found in run.items()} == {
        "0": ["lamp/d.txt", "e"], "1": ["f", "g"],
    }  # fmt: skip
    # Of two relevant documents one is no document, and one is second; the third query has none.
    gain = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    for row in made["biology"]["rows"]:
        assert row["ndcg@10"] == pytest.approx((gain + 1) / 2, abs=1e-6)
        assert row["Success@1"] == 1 / 2
    assert made["biology"]["queries"] == 2


@pytest.mark.parametrize(
    "name", ["bm25", "dense", "bm25+rm3", "dense+prf-average", "rrf:bm25:dense", "rerank:dense"]
)
def test_no_stage_sees_an_excluded_document(name, monkeypatch):
    read = []

    def score(query, documents):
        read.extend(documents)
        return np.array([len(document) / 99 for document in documents])

    monkeypatch.setitem(RERANKERS, "rerank", Reranker(lambda _: None, lambda *_: score))
    plain = ranker().rank(parse_system(name))
    out = list(plain["a"])[:1]
    left = ranker(excluded={"a": out}).rank(parse_system(name))
    assert left.keys() == plain.keys()
    assert not {*out} & {*left["a"]}
    assert left["b"] == plain["b"]
    searched = len(ranker().rank(parse_system("dense"))["a"])
    if name in ("dense", "rerank:dense"):  # The sixth document takes the place.
        assert len(left["a"]) == searched == len(CORPUS) - 1
    if name == "rerank:dense":
        read.clear()
        ranker(excluded=dict.fromkeys(QUERIES, out)).rank(parse_system(name))
        assert read
        assert not {CORPUS[document] for document in out} & {*read}


def test_the_generator_is_not_shown_an_excluded_document():
    corpus = {"d1": "cat", "d2": "cat sat", "d3": "cat sat down", "d4": "cat sat down there"}
    index = Bm25Index(corpus.values())
    search = make_expander(
        smoke.get_config().expansion, None, corpus, index.search, None,
        most_characters=100, drop_identical_ids=False, excluded={"q": ("d1", "d3", "unknown")},
    ).search  # fmt: skip
    found = search(Search(), {"q": "cat", "p": "cat"}, 2)
    assert found == {"q": ["d2", "d4"], "p": ["d1", "d2"]}


def changed(number, **fields):
    return [row | fields if i == number else row for i, row in enumerate(EXAMPLES)]


@pytest.mark.parametrize(
    ("examples", "complaint"),
    [
        (changed(0, gold_ids=["lamp/a b.txt"]),
         "document 'lamp/a_b.txt' is relevant to query '0', and excluded for it"),
        (changed(1, excluded_ids="N/A"), 'biology.jsonl:2: field "excluded_ids" is .* a list of'),
        (changed(1, excluded_ids=None), 'biology.jsonl:2: field "excluded_ids" is None'),
        (changed(1, gold_ids=[3]), 'biology.jsonl:2: field "gold_ids" is .* a list of ids'),
        (changed(2, query=7), 'biology.jsonl:3: field "query" is an integer'),
        (changed(2, id="1"), 'biology.jsonl:3: "_id" \'1\' appears a second time'),
        ([*EXAMPLES, {"query": "no id"}], 'biology.jsonl:4: no field "id"; expected a string'),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, examples, complaint):
    directory = make(tmp_path / "hub", ".jsonl")
    write_rows(directory / "examples" / "biology.jsonl", examples)
    with pytest.raises(UserError, match=complaint) as error:
        read_beir(find_collections(directory)["biology"])
    assert "\n" not in str(error.value)
    mistakes = []
    read_beir(find_collections(directory)["biology"], mistakes)
    assert mistakes


def test_a_document_that_stands_twice_counts_once_and_two_with_an_id_are_refused(tmp_path):
    directory = make(tmp_path / "hub", ".jsonl")
    path = directory / "documents" / "biology.jsonl"
    lines = path.read_text()
    path.write_text(lines + lines.splitlines()[0] + "\n")
    assert len(read_beir(find_collections(directory)["biology"]).corpus) == len(DOCUMENTS)
    path.write_text(lines + '{"id": "lamp/a_b.txt", "content": "another"}\n')
    with pytest.raises(UserError, match=r"'lamp/a_b.txt' appears a second time"):
        read_beir(find_collections(directory)["biology"])


def test_places_that_are_none_are_refused_in_a_line(tmp_path):
    directory = make(tmp_path / "hub", ".jsonl")
    for path, complaint in (
        (f"{directory}:chemistry", "no task 'chemistry'; there are biology, biology-long, pony"),
        (f"{directory / 'documents'}:biology", "no tasks as BRIGHT has them"),
        (f"{directory}2:biology", "no such directory"),
    ):
        with pytest.raises(UserError, match=complaint):
            find_collections(path)
    (directory / "examples" / "biology.jsonl").unlink()
    with pytest.raises(UserError, match=r"examples/biology: no such file; expected the queries of"):
        find_collections(directory)
    done = command("eval.beir", f"--config=configs/bright.py:{directory}", "--systems=bm25",
                   f"--workdir={tmp_path / 'out'}")  # fmt: skip
    output, _ = done.communicate(timeout=100)
    assert done.returncode == 2, output
    assert "expected the queries of documents/biology" in output
    assert "Traceback" not in output


def test_tables_with_other_columns_are_refused(tmp_path):
    directory = make(tmp_path / "hub")
    rows = [row | {"gold_ids": "e"} for row in EXAMPLES]
    write_rows(directory / "examples" / "biology-00000-of-00001.parquet", rows)
    with pytest.raises(UserError, match="column 'gold_ids' is string; expected lists of texts"):
        read_beir(find_collections(directory)["biology"])


def test_200_mutations_of_a_task_s_files_end_in_one_line_or_a_collection(tmp_path):
    directory, rng, refused = make(tmp_path / "hub", ".jsonl"), random.Random(0), 0
    files = [directory / place / "biology.jsonl" for place in ("examples", "documents")]
    for number in range(200):
        path = files[number % 2]
        data = path.read_bytes()
        path.write_bytes((spoil_json if number % 4 > 1 else mutate)(data, rng))
        try:
            read_beir(find_collections(directory)["biology"])
        except UserError as error:
            refused += 1
            check_complaint(str(error), directory)
        path.write_bytes(data)
    assert refused > 80, refused
