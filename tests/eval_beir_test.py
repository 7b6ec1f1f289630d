"""`eval.beir` on two small sets with the smoke config's models, against sentence-transformers."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer

from configs import smoke as smoke_config
from eval.beir import evaluate_beir, find_sets, mean_over_sets
from eval.strategies import STRATEGIES
from expandr_jax import metrics
from expandr_jax.data.beir import Collection, read_beir, write_beir
from expandr_jax.errors import UserError
from expandr_jax.search import Bm25Index
from tests.commands import ROOT, command, finish

SYSTEMS = [
    "bm25", "dense", "dense+q2d", "dense+prf-average", "dense+prf-rocchio", "bm25+lamer",
    "rrf:bm25:dense", "bm25@d2q", "dense@d2q", "dense@d2q+q2d", "dense@d2q+prf-average",
]  # fmt: skip
OPTIONS = ["--config=configs/smoke.py", "--query_weight=0.7", "--samples=2"]
WORDS = ["array", "sort", "pad", "matrix", "inverse", "scale", "gradient", "list", "zero", "shape"]


def write_set(directory, seed):
    """Ten documents, four test queries."""
    rng = np.random.default_rng(seed)
    corpus = {f"d{i}": " ".join(rng.choice(WORDS, 6)) for i in range(10)}
    queries = {f"q{i}": " ".join(rng.choice(WORDS, 2, replace=False)) for i in range(4)}
    qrels = {"test": {query: {f"d{i}": 1, f"d{i + 4}": 1} for i, query in enumerate(queries)}}
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
        qrels = metrics.read_qrels(out / directory.name / "qrels.trec")
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
    model = SentenceTransformer(str(ROOT / "tests" / "data" / "tiny-bert"), device="cpu")
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
    model = SentenceTransformer(str(ROOT / "tests" / "data" / "tiny-bert"), device="cpu")
    model.max_seq_length = 16
    for directory in sets:
        collection = read_beir(directory)
        (journal,) = (out / directory.name / "work" / "texts").glob("d2q-*.jsonl")
        written = {row["query_id"]: row["text"] for row in map(json.loads, open_lines(journal))}
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
        found = Bm25Index(texts).search(list(collection.queries.values()), 10)
        names = list(collection.queries), list(collection.corpus)
        run = metrics.read_trec(out / directory.name / "runs" / "bm25@d2q.trec")
        for query, scores in metrics.make_run(*names, *found, above=0.0).items():
            assert run[query] == pytest.approx(scores, abs=1e-5)


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
    names = list(collection.queries), list(collection.corpus)
    found = Bm25Index(list(collection.corpus.values())).search(queries, 10)
    run = metrics.read_trec(out / "one" / "runs" / "bm25+lamer.trec")
    expected = metrics.make_run(*names, *found, above=0.0)
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
    journals = [path for path in before if path.parent.name == "texts"]
    assert len(journals) == 6  # of queries, twice, and of documents, for two sets
    results = json.loads((out / "one" / "results.json").read_text())
    assert again(finished, SYSTEMS)["one"] == results
    for path, time in before.items():
        assert path.name in (".lock", "mean.json") or path.stat().st_mtime_ns == time
    more = again(finished, ["bm25", "bm25+q2d", "exp4fuse:bm25:bm25+q2d"])["one"]["rows"]
    assert more[0] == results["rows"][0]
    assert sorted(out.rglob("texts/*")) == sorted(journals)
    assert all(path.stat().st_mtime_ns == before[path] for path in journals)
    assert again(finished, SYSTEMS)["one"] == results


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


def test_sets_are_checked_before_anything_is_loaded(finished, tmp_path):
    one, two = map(str, finished[0])
    assert list(find_sets([one, two], "test")) == ["one", "two"]
    with pytest.raises(UserError, match="a second data set called 'one'"):
        find_sets([one, one], "test")
    with pytest.raises(UserError, match="no judgements of split 'dev'; there are test"):
        find_sets([one], "dev")
    for names, data in ((["bm26"], [one]), (["bm25"], [tmp_path / "nowhere"])):
        with pytest.raises(UserError, match=r"bm26|nowhere: no such directory"):
            again(finished, names, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()
