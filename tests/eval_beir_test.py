"""`eval.beir` on two small sets with the smoke config's models, against sentence-transformers."""

import csv
import html
import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from configs import smoke as smoke_config
from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, read_beir, read_qrels, write_beir
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.errors import UserError
from expandr_jax.expansion.strategies import STRATEGIES, document_message
from expandr_jax.files.records import hash_json
from expandr_jax.ranking.results import mean_over_sets
from expandr_jax.search import Bm25Index, search_named
from tests.commands import ROOT, command, finish

SYSTEMS = [
    "bm25", "dense", "dense+q2d", "dense+prf-average", "dense+prf-rocchio", "bm25+lamer",
    "rrf:bm25:dense", "bm25@d2q", "dense@d2q", "dense@d2q+q2d", "dense@d2q+prf-average",
]  # fmt: skip
OPTIONS = ["--config=configs/smoke.py", "--query_weight=0.7", "--samples=2"]
WORDS = ["array", "sort", "pad", "matrix", "inverse", "scale", "gradient", "list", "zero", "shape"]


def write_set(directory, seed, dev=0):
    """Ten documents, four test queries, and so many dev queries."""
    rng = np.random.default_rng(seed)
    corpus = {f"d{i}": " ".join(rng.choice(WORDS, 6)) for i in range(10)}
    queries = {f"q{i}": " ".join(rng.choice(WORDS, 2, replace=False)) for i in range(4)}
    qrels = {"test": {query: {f"d{i}": 1, f"d{i + 4}": 1} for i, query in enumerate(queries)}}
    for i in range(dev):
        queries[f"v{i}"] = " ".join(rng.choice(WORDS, 2, replace=False))
        qrels.setdefault("dev", {})[f"v{i}"] = {f"d{i % 10}": 1}
    write_beir(directory, Collection(directory.name, corpus, queries, qrels))
    return directory


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The sets, the workdir, and what was printed."""
    root = tmp_path_factory.mktemp("beir")
    sets = [write_set(root / "sets" / name, seed) for seed, name in enumerate(("one", "two"))]
    data, systems = f"--data={sets[0]},{sets[1]}", f"--systems={','.join(SYSTEMS)}"
    output = finish(command("eval.beir", *OPTIONS, data, systems, f"--workdir={root / 'out'}"))
    return sets, root / "out", output


def again(finished, names, workdir=None, data=None, query_weight=0.7):
    """The same evaluation in this process, on what is there."""
    sets, out, _ = finished
    config = smoke_config.get_config()
    config.evaluation.query_weights, config.evaluation.samples = (query_weight,), (2,)
    console = Console(quiet=True)
    data = list(map(str, data or sets))
    return evaluate_beir(config, workdir or out, data, names, "test", console)


def test_each_set_has_its_files_and_the_table_is_printed(finished):
    sets, out, output = finished
    for directory in sets:
        results = json.loads((out / directory.name / "results.json").read_text())
        assert (results["dataset"], results["queries"]) == (directory.name, 4)
        assert [row["system"] for row in results["rows"]] == SYSTEMS
        compared = [row for row in results["significance"] if row["metric"] == "map"]
        assert [row["system"] for row in compared] == SYSTEMS[1:]
        assert {row["baseline"] for row in compared} == {"bm25"}
        qrels = read_qrels(out / directory.name / "qrels.trec")
        assert qrels == read_beir(directory).qrels["test"]
        for row in results["rows"]:
            run = metrics.read_trec(out / directory.name / "runs" / f"{row['system']}.trec")
            values = metrics.evaluate(run, qrels)
            assert row["ndcg@10"] == pytest.approx(metrics.mean(values["ndcg@10"]), abs=1e-6)
    assert "ndcg@10 over 2 sets" in output


def test_the_mean_is_over_sets_and_a_family_counts_as_one():
    def table(*values):
        names = ("ndcg@10", "mrr@10", "recall@100", "map")
        return {"rows": [{"system": f"s{v}", **dict.fromkeys(names, v)} for v in values]}

    results = {"a": table(0.2, 0.4), "cqa/x": table(0.4, 0.4), "cqa/y": table(0.8, 0.6)}
    mean = mean_over_sets(results)
    assert list(mean["sets"]) == ["a", "cqa"]
    assert [row["map"] for row in mean["sets"]["cqa"]] == [0.6, 0.5]
    assert [row["map"] for row in mean["rows"]] == [0.4, 0.45]


def test_vectors_are_what_sentence_transformers_and_the_formulas_give(finished):
    sets, out, _ = finished
    model = SentenceTransformer(str(ROOT / "configs" / "tiny" / "tiny-bert"), device="cpu")
    model.max_seq_length = 16

    def encode(texts):
        return model.encode(texts, normalize_embeddings=True)

    for directory in sets:
        collection = read_beir(directory)
        documents = encode(list(collection.corpus.values()))
        queries = encode(list(collection.queries.values()))
        texts = expansions(out / directory.name, "dense+q2d")
        passages = np.stack([encode(texts[query]).mean(0) for query in collection.queries])
        top = documents[np.argsort(-(queries @ documents.T), axis=1)[:, :3]]
        for system, vectors in {
            "dense": queries,
            "dense+q2d": unit(0.7 * queries + 0.3 * passages),
            "dense+prf-average": (queries + top.sum(1)) / 4,
            "dense+prf-rocchio": 0.9 * queries + 0.1 * top.mean(1),
        }.items():
            run = metrics.read_trec(out / directory.name / "runs" / f"{system}.trec")
            expected = vectors @ documents.T
            for row, query in enumerate(collection.queries):
                found = [run[query][document] for document in collection.corpus]
                np.testing.assert_allclose(found, expected[row], atol=2e-5, err_msg=system)


def test_expanded_documents_are_searched_in_the_place_of_their_texts(finished):
    sets, out, _ = finished
    model = SentenceTransformer(str(ROOT / "configs" / "tiny" / "tiny-bert"), device="cpu")
    model.max_seq_length = 16
    for directory in sets:
        collection = read_beir(directory)
        (cache,) = (out / "work" / "texts").glob("d2q-*.jsonl")
        prompts = {
            hash_json([document_message("d2q", text, most_characters=100, fits=lambda _: True),
                       1.0, 0.9, 8])[:16]: key
            for key, text in collection.corpus.items()
        }  # fmt: skip
        rows = [json.loads(line) for line in open_lines(cache)]
        written = {row["query_id"]: row["text"] for row in rows if row["prompt"] in prompts}
        assert {*written} == {*collection.corpus}
        assert any(written.values())
        texts = [f"{text} {written[i]}".strip() for i, text in collection.corpus.items()]
        documents = model.encode(texts, normalize_embeddings=True)
        before = model.encode(list(collection.corpus.values()), normalize_embeddings=True)
        assert not np.allclose(documents, before, atol=1e-3)
        queries = model.encode(list(collection.queries.values()), normalize_embeddings=True)
        passages = expansions(out / directory.name, "dense@d2q+q2d")
        assert passages == expansions(out / directory.name, "dense+q2d")
        means = [
            model.encode(passages[query], normalize_embeddings=True).mean(0)
            for query in collection.queries
        ]
        top = documents[np.argsort(-(queries @ documents.T), axis=1)[:, :3]]
        for system, vectors in {
            "dense@d2q": queries,
            "dense@d2q+q2d": unit(0.7 * queries + 0.3 * np.stack(means)),
            "dense@d2q+prf-average": (queries + top.sum(1)) / 4,
        }.items():
            run = metrics.read_trec(out / directory.name / "runs" / f"{system}.trec")
            expected = vectors @ documents.T
            for row, query in enumerate(collection.queries):
                found = [run[query][document] for document in collection.corpus]
                np.testing.assert_allclose(found, expected[row], atol=2e-5, err_msg=system)
        found = by_words(Bm25Index(texts), collection, list(collection.queries.values()))
        run = metrics.read_trec(out / directory.name / "runs" / "bm25@d2q.trec")
        for query, scores in found.items():
            assert run[query] == pytest.approx(scores, abs=1e-5)


def by_words(index, collection, queries):
    """A run of the best ten of each query."""
    names = list(collection.queries), queries, list(collection.corpus)
    return search_named(index.search, *names, 10, drop_identical_ids=False, above=0.0)


def open_lines(path):
    return path.read_text().splitlines()


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def expansions(directory, system):
    """Query id -> texts of a system, in order."""
    texts = {}
    for line in (directory / "evaluation" / "expansions.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["system"] == system:
            assert row["sample"] == len(texts.setdefault(row["query_id"], []))
            texts[row["query_id"]].append(row["expansion"])
    return texts


def test_bm25_searches_for_what_the_strategy_makes(finished):
    sets, out, _ = finished
    collection = read_beir(sets[0])
    texts = expansions(out / "one", "bm25+lamer")
    assert all(len(several) == 2 for several in texts.values())
    sparse = STRATEGIES["lamer"].sparse
    queries = [sparse(q, [t for t in texts[i] if t]) for i, q in collection.queries.items()]
    run = metrics.read_trec(out / "one" / "runs" / "bm25+lamer.trec")
    expected = by_words(Bm25Index(list(collection.corpus.values())), collection, queries)
    assert {q: {*scores} for q, scores in run.items()} == {q: {*s} for q, s in expected.items()}
    for query, scores in expected.items():
        assert run[query] == pytest.approx(scores, abs=1e-5)


def test_a_fusion_adds_reciprocal_ranks(finished):
    directory = finished[1] / "one" / "runs"
    fused, *parts = (metrics.read_trec(directory / f"{name}.trec")
                     for name in ("rrf:bm25:dense", "bm25", "dense"))  # fmt: skip
    for query, scores in fused.items():
        rankings = [list(part[query]) for part in parts if query in part]
        for document, score in scores.items():
            ranks = [ranking.index(document) + 1 for ranking in rankings if document in ranking]
            assert score == pytest.approx(sum(1 / (60 + rank) for rank in ranks), abs=1e-6)


def test_the_same_command_does_nothing_and_another_system_asks_nothing_twice(finished):
    _, out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    kept = [path for path in before if path.parent.name == "texts" and path.suffix == ".jsonl"]
    assert len(kept) == 3  # two requests of queries, and one of documents
    results = json.loads((out / "one" / "results.json").read_text())
    assert again(finished, SYSTEMS)["one"] == results
    for path, time in before.items():
        written_again = path.suffix == ".lock" or path.parent == out  # the lock, and the mean
        assert written_again or path.stat().st_mtime_ns == time
    more = again(finished, ["bm25", "bm25+q2d", "exp4fuse:bm25:bm25+q2d"])["one"]["rows"]
    assert more[0] == results["rows"][0]
    assert sorted(out.rglob("texts/*.jsonl")) == sorted(kept)
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    assert again(finished, SYSTEMS)["one"] == results


def test_tables_and_values_of_each_query_are_written(finished):
    _, out, _ = finished
    measures = ["ndcg@10", "mrr@10", "recall@100", "map"]
    results = json.loads((out / "two" / "results.json").read_text())
    expected = [[row["system"], *(f"{row[m]:.4f}" for m in measures)] for row in results["rows"]]
    with open(out / "two" / "results.csv", newline="") as file:
        assert list(csv.reader(file)) == [["system", *measures], *expected]
    for suffix in (".md", ".tex"):
        text = (out / "two" / f"results{suffix}").read_text()
        assert all(cell in text for row in expected for cell in row)
    values = [json.loads(line) for line in open_lines(out / "two" / "values.jsonl")]
    assert len(values) == len(SYSTEMS) * 4
    for row in results["rows"]:
        mine = [value for value in values if value["system"] == row["system"]]
        assert [value["query_id"] for value in mine] == ["q0", "q1", "q2", "q3"]
        for measure in measures:
            assert np.mean([value[measure] for value in mine]) == pytest.approx(
                row[measure], abs=1e-6
            )
    with open(out / "mean.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["system", "one", "two", "mean"]
    assert [row[0] for row in rows] == SYSTEMS
    for row in rows:
        assert float(row[3]) == pytest.approx((float(row[1]) + float(row[2])) / 2, abs=1e-4)


def test_pages_hold_the_table_the_tests_and_the_expansions(finished):
    _, out, output = finished
    assert output.rstrip().endswith(str(out / "report.html"))
    page = (out / "report.html").read_text()
    assert "By set" in page
    assert page.count("<svg") == 2  # means, and time
    page = (out / "one" / "report.html").read_text()
    for part in ("Results", "Against bm25", "Queries that moved most"):
        assert f"<h2>{part}</h2>" in page
    for row in json.loads((out / "one" / "results.json").read_text())["rows"]:
        assert f"{row['ndcg@10']:.4f}" in page
    assert "http" not in re.sub(r'xmlns\S*="[^"]*"', "", page)
    shown = re.findall(r"<blockquote>(.*?)</blockquote>", page, re.DOTALL)
    texts = {
        " ".join(text.split())
        for system in ("dense+q2d", "bm25+lamer", "dense@d2q+q2d")
        for several in expansions(out / "one", system).values()
        for text in several
    }
    assert shown
    assert all(
        html.unescape(text).split(" | ")[0].strip()[:40] in " ".join(texts) for text in shown
    )


def test_other_measures_and_the_config_s_own_data(tmp_path):
    config = smoke_config.get_config()
    config.evaluation.query_weights, config.evaluation.samples = (0.5,), (1,)
    console = Console(quiet=True)
    found = evaluate_beir(config, tmp_path, [], ["bm25"], "test", console, ["P@1", "map"])
    assert list(found) == ["pydoc"]
    (row,) = found["pydoc"]["rows"]
    assert list(row) == ["system", "ndcg@10", "mrr@10", "recall@100", "map", "P@1"]
    assert (found["pydoc"]["dataset"], found["pydoc"]["queries"]) == ("pydoc", 16)
    run = metrics.read_trec(tmp_path / "runs" / "bm25.trec")
    qrels = read_beir(tmp_path / "data").qrels["test"]
    first = [qrels[query].get(next(iter(run.get(query, {})), ""), 0) for query in qrels]
    assert row["P@1"] == pytest.approx(np.mean(first), abs=1e-6)
    again = evaluate_beir(config, tmp_path, [], ["bm25"], "test", console, ["P@1"])
    assert again == found
    with pytest.raises(UserError, match="measure 'P@x' is unknown"):
        evaluate_beir(config, tmp_path / "no", [], ["bm25"], "test", console, ["P@x"])
    config.data.kind = "triples"
    with pytest.raises(UserError, match="--data is missing"):
        evaluate_beir(config, tmp_path / "no", [], ["bm25"], "test", console)
    assert not (tmp_path / "no").exists()


def test_another_workdir_can_have_the_same_texts(finished, tmp_path, monkeypatch):
    sets, out, _ = finished
    monkeypatch.setattr("expandr_jax.expansion.cache.sample_texts", None)  # Nothing is generated.
    config = smoke_config.get_config()
    config.evaluation.query_weights, config.evaluation.samples = (0.3,), (1,)
    console = Console(quiet=True)
    cache = out / "work" / "texts"
    names = ["dense+q2d", "bm25+q2d"]
    evaluate_beir(config, tmp_path, [str(sets[0])], names, "test", console, cache=cache)
    once = expansions(tmp_path, "dense+q2d")
    twice = expansions(out / "one", "dense+q2d")
    assert once == {query: texts[:1] for query, texts in twice.items()}


def test_what_was_made_otherwise_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="query_weights was"):
        again(finished, SYSTEMS, query_weight=0.5)
    changed = tmp_path / "one"
    shutil.copytree(finished[0][0], changed)
    again(finished, ["bm25"], tmp_path / "out", [changed])
    with open(changed / "corpus.jsonl", "a") as file:
        file.write('{"_id": "new", "text": "a document"}\n')
    with pytest.raises(UserError, match="was made with other data"):
        again(finished, ["bm25"], tmp_path / "out", [changed])


def test_what_is_damaged_is_named(finished, tmp_path):
    out = tmp_path / "out"
    again(finished, ["bm25"], out, finished[0][:1])
    for name in ("results.json", "data/SOURCE.json", "config.json"):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"{name}: is damaged"):
            again(finished, ["bm25"], out, finished[0][:1])
        (out / name).write_bytes(whole)
    (out / "results.json").unlink()
    (out / "runs" / "bm25.trec").write_text("q0 Q0 d0 1\n")
    with pytest.raises(UserError, match=r"bm25\.trec:1: "):
        again(finished, ["bm25"], out, finished[0][:1])


def test_feedback_where_the_only_document_is_left_out(tmp_path):
    write_beir(
        tmp_path / "one",
        Collection("one", {"x": "pad an array"}, {"x": "pad"}, {"test": {"x": {"x": 1}}}),
    )
    config = smoke_config.get_config()
    config.evaluation.query_weights, config.evaluation.samples = (0.5,), (1,)
    config.evaluation.drop_identical_ids = True
    console = Console(quiet=True)
    names = ["bm25", "dense", "dense+prf-average", "rrf:bm25:dense"]
    found = evaluate_beir(config, tmp_path / "out", [str(tmp_path / "one")], names, "test", console)
    assert [row["ndcg@10"] for row in found["one"]["rows"]] == [0.0] * 4


def test_sets_are_checked_before_anything_is_loaded(finished, tmp_path):
    one, two = map(str, finished[0])
    assert list(find_benchmarks([one, two])) == ["one", "two"]
    with pytest.raises(UserError, match="a second data set called 'one'"):
        find_benchmarks([one, one])
    with pytest.raises(UserError, match="no judgements of split 'dev'; there are test"):
        find_benchmarks([one], "dev")
    msmarco = shutil.copytree(one, tmp_path / "msmarco")
    with pytest.raises(UserError, match="no judgements of split 'dev'; there are test"):
        find_benchmarks([msmarco])
    (msmarco / "qrels" / "test.tsv").rename(msmarco / "qrels" / "dev.tsv")
    found = find_benchmarks([msmarco, two])
    assert [tested.split for tested in found.values()] == ["dev", "test"]
    dev = msmarco / "qrels" / "dev.tsv"
    dev.write_text(dev.read_text().replace("\t1\n", "\t0\n"))
    with pytest.raises(UserError, match="no grade above 0 in split 'dev'; expected some"):
        find_benchmarks([msmarco, two])
    for names, data in ((["bm26"], [one]), (["bm25"], [tmp_path / "nowhere"])):
        with pytest.raises(UserError, match=r"bm26|nowhere: no such directory"):
            again(finished, names, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()
