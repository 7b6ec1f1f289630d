"""What eval.beir builds for a system, and what it does without."""

import contextlib
import json
import tracemalloc
from types import SimpleNamespace

import pytest
from rich.console import Console

from configs import base, smoke
from eval import set_ranker
from eval.beir import evaluate_beir
from expandr_jax import metrics
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.documents import write_documents
from expandr_jax.expansion.combine import WAYS
from expandr_jax.expansion.expand import Expander
from expandr_jax.files.records import hash_json
from expandr_jax.ranking.choices import Choice
from expandr_jax.ranking.stages import interpolate
from expandr_jax.ranking.systems import parse_system
from expandr_jax.runtime.progress import Reporter
from tests.eval_beir_test import open_lines, write_set

QUIET = Reporter(Console(quiet=True))


@pytest.mark.parametrize(("name", "built"), [("dense+q2d", 0), ("dense+lamer", 1)])
def test_words_are_indexed_only_where_a_strategy_searches_them(monkeypatch, tmp_path, name, built):
    indexes = []
    monkeypatch.setattr(set_ranker, "kept_bm25", lambda *a, **k: indexes.append(a))

    def texts(self, queries, samples, sample):
        for step in self.strategy.steps:
            if not hasattr(step, "prompt"):
                with pytest.raises(AttributeError):  # There is no index behind the name here.
                    self.search(step, queries, 1)
        return {query: [["text"]] for query in queries}

    monkeypatch.setattr(Expander, "texts", texts)
    config = SimpleNamespace(
        expansion=SimpleNamespace(strategy="q2d", template=""),
        answer=SimpleNamespace(max_characters=100),
        evaluation=SimpleNamespace(samples=(1,), drop_identical_ids=False, depth=10),
    )
    run, models = SimpleNamespace(config=config, reporter=QUIET), SimpleNamespace(sampler=None)
    collection = Collection("set", {"d": "text"}, {"q": "query"}, {"test": {"q": {"d": 1}}})
    made = set_ranker.SetRanker(run, models, collection, "test", tmp_path, None)
    made.expansions(parse_system(name))
    assert len(indexes) == built


def test_feedback_on_expanded_documents_reads_what_was_added_to_them(monkeypatch, tmp_path):
    """The questions of the document that is found first lead to another with the same word."""

    def ask(self, _, requests):
        return {(r.id, 0): "strudel" if r.id in ("d0", "d9") else f"more{r.id}" for r in requests}

    monkeypatch.setattr(set_ranker.SetRanker, "_ask", ask)
    config = with_settings(read_config(base.get_config()), {"evaluation.depth": 3})
    run = SimpleNamespace(config=config, reporter=QUIET, phase=lambda _: contextlib.nullcontext())
    models = SimpleNamespace(sampler=SimpleNamespace(fits=lambda _: True))
    corpus = {f"d{i}": "apple cake" if i == 0 else f"text of number{i}" for i in range(30)}
    collection = Collection("set", corpus, {"q": "apple"}, {"test": {"q": {"d9": 1}}})
    made = set_ranker.SetRanker(run, models, collection, "test", tmp_path, None)
    assert list(made.ranker.rank(parse_system("bm25@d2q"))["q"]) == ["d0"]
    assert list(made.ranker.rank(parse_system("bm25+rm3"))["q"]) == ["d0"]
    assert list(made.ranker.rank(parse_system("bm25@d2q+rm3"))["q"]) == ["d0", "d9"]


def test_expanded_documents_are_read_from_a_disk(monkeypatch, tmp_path):
    """None of them stays in memory, and their vectors have the name that they had in a list."""

    def ask(self, _, requests):
        return {(request.id, 0): f"asked {request.id}" for request in requests}

    monkeypatch.setattr(set_ranker.SetRanker, "_ask", ask)
    made = []
    monkeypatch.setattr(
        set_ranker, "CorpusRetriever",
        lambda *of, **_: made.append(of) or SimpleNamespace(corpus=SimpleNamespace(evaluated=None)),
    )  # fmt: skip
    config = read_config(base.get_config())
    run = SimpleNamespace(config=config, processes=None, reporter=QUIET, phase=str)
    model = SimpleNamespace(encoder=None, retriever_params=None, normalize="both")
    models = SimpleNamespace(sampler=SimpleNamespace(fits=lambda _: True), retriever=model)
    corpus = write_documents((f"d{i}", f"{i} " * 30_000) for i in range(100))
    collection = Collection("set", corpus, {"q": "apple"}, {"test": {"q": {"d9": 1}}})
    ranker = set_ranker.SetRanker(run, models, collection, "test", tmp_path, None)
    write_documents([("d", "text")], tmp_path / "other")  # Arrow is imported by now.
    tracemalloc.start()
    ranker._dense("dense", "d2q")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    ((_, _, texts, path),) = made
    assert sum(map(len, texts.values())) > 6_000_000
    assert held < 1_000_000
    assert [*texts] == [*corpus]
    assert [*texts.values()] == [f"{text} asked {i}".strip() for i, text in corpus.items()]
    assert path.name == f"vectors-d2q-{hash_json([*texts.values()])[:16]}.npy"


@pytest.mark.parametrize(
    ("name", "depth"), [("bm25+lamer", 3), ("dense+csqe", 3), ("bm25+lamer", 20)]
)
def test_a_prompt_shows_ten_passages_however_many_documents_a_run_has(
    monkeypatch, tmp_path, name, depth
):
    prompts = []

    def ask(self, _, requests):
        prompts.extend(request.prompt for request in requests)
        return {(request.id, request.sample): "text" for request in requests}

    monkeypatch.setattr(set_ranker.SetRanker, "_ask", ask)
    settings = {"evaluation.depth": depth, "evaluation.samples": (1,)}
    config = with_settings(read_config(base.get_config()), settings)
    run = SimpleNamespace(config=config, reporter=QUIET)
    models = SimpleNamespace(sampler=SimpleNamespace(fits=lambda _: True))
    corpus = {f"d{i}": f"of a query {i}" for i in range(12)}
    collection = Collection("set", corpus, {"q": "query"}, {"test": {"q": {"d1": 1}}})
    made = set_ranker.SetRanker(run, models, collection, "test", tmp_path, None)
    made.expansions(parse_system(name))
    assert prompts[-1].count("of a query") == 10


def evaluated(data, out, names):
    """results.json of sets with the smoke config's models."""
    config = smoke.get_config()
    config.evaluation.query_weights, config.evaluation.samples = (0.5,), (1,)
    return evaluate_beir(config, out, list(map(str, data)), names, "test", Console(quiet=True))


def test_a_fusion_is_weighed_where_a_set_has_dev_queries(tmp_path, monkeypatch):
    data = [write_set(tmp_path / "with", 1, dev=6), write_set(tmp_path / "without", 2)]
    names, out = ["bm25", "dense", "interpolation:bm25:dense"], tmp_path / "out"
    first = evaluated(data, out, names)
    assert first["without"]["chosen"] == {}
    chosen = first["with"]["chosen"]
    tried = [json.loads(line) for line in open_lines(out / "with" / "evaluation" / "choices.jsonl")]
    assert len(tried) == 11
    assert len({row["ndcg@10"] for row in tried}) > 1
    best = max(tried, key=lambda row: row["ndcg@10"])
    assert chosen == {names[2]: {"weights": best["weights"]}}
    for name, weights in (("with", best["weights"]), ("without", [0.5, 0.5])):
        runs = [metrics.read_trec(out / name / "runs" / f"{system}.trec") for system in names]
        for query, found in runs[2].items():
            fused = interpolate([run.get(query, {}) for run in runs[:2]], weights)
            assert found == pytest.approx(fused, abs=1e-6)
    # Killed after the run was written, it says the same of it.
    (out / "with" / "results.json").unlink()
    monkeypatch.setattr("expandr_jax.ranking.choices.choose", None)
    assert evaluated(data, out, names) == first


@pytest.mark.parametrize(
    ("combine", "dev", "expected"),
    [
        ("mean", True, Choice(0.7, 2)),
        ("max", True, Choice(0.7, 2, "max")),
        ("dev", False, Choice(0.7, 2)),  # There is nothing to choose it by.
        ("dev", True, None),
    ],
)
def test_how_texts_count_is_chosen_where_a_set_has_dev_queries(
    monkeypatch, tmp_path, combine, dev, expected
):
    monkeypatch.setattr(
        Expander, "texts", lambda self, queries, *_: {query: [["a", "b"]] for query in queries}
    )
    settings = {"evaluation.samples": (2,), "evaluation.query_weights": (0.7,)}
    config = with_settings(read_config(base.get_config()), settings)
    config = with_settings(config, {"expansion.combine": combine})
    run = SimpleNamespace(config=config, reporter=QUIET)
    qrels = {"test": {"q": {"d": 1}}} | ({"dev": {"v": {"d": 1}, "w": {"d": 0}}} if dev else {})
    queries = {"q": "query", "v": "other", "w": "nothing found"}
    collection = Collection("set", {"d": "text"}, queries, qrels)
    made = set_ranker.SetRanker(
        run, SimpleNamespace(sampler=None), collection, "test", tmp_path, None
    )
    leaf = parse_system("dense+q2d")
    if expected:
        assert made._choice(leaf) == expected
    else:
        assert made._tried(leaf) == [Choice(0.7, 2, way) for way in WAYS]
        assert made._dev.ids == ["v"]  # The other has no relevant document.
