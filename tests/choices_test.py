"""What is chosen on dev: the grid, what is taken of it, and that nothing else decides."""

import contextlib
import dataclasses
import io
import itertools
import json
import types

import numpy as np
import pytest
from rich.console import Console

from configs import smoke as smoke_config
from expandr_jax import metrics
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.files.records import read_jsonl
from expandr_jax.ranking.choices import (
    MOST_WEIGHTS,
    Choice,
    DevChoices,
    PartWeights,
    as_record,
    from_record,
    weight_grid,
)
from expandr_jax.ranking.ranker import Expansions
from expandr_jax.ranking.systems import parse_system
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.run import Run
from expandr_jax.search import Bm25Index
from expandr_jax.search.divided import DividedWords
from expandr_jax.vectors.corpus import Corpus
from tests.ranker_test import SEARCH, encode, vector
from train import evaluation

WORDS = ("pad", "an", "array", "sort", "list", "scale", "matrix", "zeros", "shape", "axis")
CORPUS = {f"d{i}": " ".join(np.random.default_rng(i).choice(WORDS, 4)) for i in range(40)}
QUERIES = {f"q{i}": " ".join(np.random.default_rng(100 + i).choice(WORDS, 2)) for i in range(30)}
DEV, TEST = list(QUERIES)[:15], list(QUERIES)[15:]


def judgements(seed):
    """Two relevant documents a query."""
    rng = np.random.default_rng(seed)
    return {query: {f"d{i}": 1 for i in rng.permutation(40)[:2].tolist()} for query in QUERIES}


def test_weights_are_tried_from_the_most_even_on():
    assert [w.weights for w in weight_grid(2, 4)] == [
        (0.5, 0.5), (0.75, 0.25), (0.25, 0.75), (1.0, 0.0), (0.0, 1.0)
    ]  # fmt: skip
    assert [w.weights for w in weight_grid(2, 1)] == [(0.5, 0.5), (1.0, 0.0), (0.0, 1.0)]
    tenths = {w.weights for w in weight_grid(2, 10)}
    assert tenths == {(i / 10, (10 - i) / 10) for i in range(11)}
    # Thirds are no tenths: equal weights come first all the same.
    first, *others = [w.weights for w in weight_grid(3, 10)]
    assert first == (1 / 3, 1 / 3, 1 / 3)
    expected = [t for t in itertools.product(range(11), repeat=3) if sum(t) == 10]
    assert {tuple(round(10 * w) for w in weights) for weights in others} == {*expected}
    assert len(others) == len(expected) == 66


@pytest.mark.parametrize("parts", [2, 3, 4, 5, 8])
def test_there_are_few_ways_however_many_parts(parts):
    grid = weight_grid(parts, 100)
    assert len(grid) <= MOST_WEIGHTS + 1
    assert len(set(grid)) == len(grid)
    for weights in grid:
        assert sum(weights.weights) == pytest.approx(1)
        assert min(weights.weights) >= 0


def test_what_is_chosen_is_read_as_it_was_written():
    for chosen in (Choice(0.7, 2), Choice(None, 1), PartWeights((0.25, 0.75))):
        assert from_record(json.loads(json.dumps(as_record(chosen)))) == chosen


class Toy:
    """Dev runs of two parts of a fusion, which are given."""

    ids = ("a", "b")

    def __init__(self, first, second):
        self.runs = {"bm25": first, "dense": second}
        self.ranked = []

    def rank(self, system):
        self.ranked.append(system.name)
        return self.runs[system.name]

    def search(self, system, choice):
        fused = {}
        for query in self.ids:
            fused[query] = {}
            for part, weight in zip(system.parts, choice.weights, strict=True):
                for document, score in self.runs[part.name][query].items():
                    fused[query].setdefault(document, 0.0)
                    fused[query][document] += weight * score
        return fused


def test_the_best_on_dev_is_taken_and_of_equal_ones_the_most_even():
    system = parse_system("interpolation:bm25:dense")
    first = {"a": {"x": 1.0, "y": 0.0}, "b": {"x": 1.0, "y": 0.0}}
    second = {"a": {"x": 0.0, "y": 1.0}, "b": {"x": 1.0, "y": 0.0}}
    for relevant, expected in (
        ("y", (0.5, 0.5)),  # Of equal scores the greater id is first.
        ("x", (0.55, 0.45)),
        ("z", (0.5, 0.5)),  # No weights find it.
    ):
        dev = Toy(first, second)
        qrels = {"a": {relevant: 1}, "b": {"x": 1}}
        made = DevChoices(lambda dev=dev: dev, qrels, lambda s: weight_grid(2, 20), made={})
        chosen = made(system)
        assert chosen == PartWeights(expected)
        assert dev.ranked == ["bm25", "dense"]
        assert made.made == {system.name: chosen}
        assert len(made.tried) == 21
        best = max(made.tried, key=lambda row: row["ndcg@10"])
        assert best["weights"] == [*expected]
    assert DevChoices(lambda: dev, {}, lambda s: [], made={})(system) is None
    other = DevChoices(lambda: dev, qrels, lambda s: weight_grid(2, 4), made={}, is_main=False)
    assert other(system) is None
    assert not other.tried
    assert other.needs(system)
    assert not DevChoices(lambda: dev, qrels, lambda s: [1], made=made.made).needs(system)


SYSTEMS = (
    "bm25", "zero-shot", "expandr", "zero-shot+prf-rocchio", "interpolation:bm25:zero-shot",
    "interpolation:bm25:expandr", "interpolation:bm25:zero-shot+prf-rocchio",
)  # fmt: skip


def evaluated(monkeypatch, workdir, systems, qrels, chosen=None, folder="", settings=None):
    """results.json of `evaluate_systems` with toy models: also what is searched for, how often."""
    searched = []

    def retriever(name):
        vectors = np.stack([vector(f"{name} {text}") for text in CORPUS.values()])
        corpus = Corpus(list(CORPUS), vectors, SEARCH)

        def encoded(texts, kind, ids):
            searched.append((name, len(texts)))
            return encode(texts, kind, ids)

        return types.SimpleNamespace(
            corpus=corpus, encode=encoded, separator="", params=None, release=lambda: None,
            normalize="both",
        )  # fmt: skip

    def expansions(run, data, own, adapters, systems, folder):
        of = STRATEGIES["q2d"]
        return {
            (split, "trained", "expansion"): Expansions(
                of, [[[f"of {QUERIES[q]}", CORPUS["d1"]]] for q in data.collection.qrels[split]]
            )
            for split in ("dev", "test")
        }

    monkeypatch.setattr(evaluation, "evaluation_expansions", expansions)
    monkeypatch.setattr(evaluation, "run_expander", lambda *_: None)
    monkeypatch.setattr(evaluation, "run_retriever", lambda *a: retriever(a[-1].rpartition("/")[2]))
    index = Bm25Index(list(CORPUS.values()))
    words = DividedWords("", lambda: index, Processes(), workdir)
    monkeypatch.setattr(evaluation, "run_words", lambda *_: words)
    monkeypatch.setattr(evaluation, "sample_rows", lambda *_: [])
    settings = {"evaluation.systems": systems, **(settings or {})}
    config = with_settings(read_config(smoke_config.get_config()), settings)
    run = Run(workdir, config, Console(file=io.StringIO()))
    collection = Collection("toy", CORPUS, QUERIES, qrels)
    retrievers = {name: retriever(name) for name in ("zero-shot", "expandr")}
    with contextlib.closing(run):
        results = evaluation.evaluate_systems(
            run, None, TrainingData(collection, [], []), retrievers, {}, folder=folder,
            chosen=chosen,
        )  # fmt: skip
    return results, searched


def qrels_of(seed, test_seed):
    dev, test = judgements(seed), judgements(test_seed)
    return {"dev": {q: dev[q] for q in DEV}, "test": {q: test[q] for q in TEST}}


def recomputed(workdir, results, name):
    """A fused row's run as docs/run.md says it comes of results.json and the parts' runs."""
    weights = results["chosen"][name]["weights"]
    parts = [metrics.read_trec(workdir / "runs" / f"{p.name}.trec")
             for p in parse_system(name).parts]  # fmt: skip
    fused = {}
    for query in TEST:
        scores = {}
        for part, weight in zip(parts, weights, strict=True):
            found = part.get(query, {})
            for document, score in found.items():
                low, high = min(found.values()), max(found.values())
                scaled = (score - low) / (high - low) if high > low else 1.0
                scores[document] = scores.get(document, 0.0) + weight * scaled
        best = sorted(scores, key=lambda d: (np.float32(scores[d]), d), reverse=True)
        fused[query] = best[:100]
    return fused


def test_a_run_s_fusions_are_weighed_by_its_dev_queries_alone(monkeypatch, tmp_path):
    results, _ = evaluated(monkeypatch, tmp_path / "a", SYSTEMS, qrels_of(1, 2))
    fused = [name for name in SYSTEMS if name.startswith("interpolation")]
    assert {*results["chosen"]} == {"expandr", *fused}
    choices = tmp_path / "a" / "evaluation" / "choices.jsonl"
    rows = [row for _, row in read_jsonl(choices, {"system": str})]
    for name in fused:
        weights = results["chosen"][name]["weights"]
        tried = [row for row in rows if row["system"] == name]
        assert len(tried) == 11
        first = max(tried, key=lambda row: row["ndcg@10"])
        assert first["weights"] == weights
        run = metrics.read_trec(tmp_path / "a" / "runs" / f"{name}.trec")
        assert {q: [*run[q]] for q in TEST} == recomputed(tmp_path / "a", results, name)
    pairs = [(row["system"], row["baseline"]) for row in results["significance"][::4]]
    assert pairs == [
        *(("expandr", name) for name in SYSTEMS if name != "expandr"),
        (fused[1], "bm25"), (fused[1], fused[0]), (fused[1], fused[2]),
    ]  # fmt: skip
    # Whatever the test queries' judgements are, the same is chosen.
    other, _ = evaluated(monkeypatch, tmp_path / "b", SYSTEMS, qrels_of(1, 3))
    assert other["chosen"] == results["chosen"]
    assert other["rows"] != results["rows"]
    # Other dev judgements choose otherwise: the choice does hang on them.
    other, _ = evaluated(monkeypatch, tmp_path / "c", SYSTEMS, qrels_of(4, 2))
    assert other["chosen"] != results["chosen"]
    # A further collection, which has no dev queries, uses the same.
    qrels = qrels_of(1, 2) | {"dev": {}}
    further, _ = evaluated(
        monkeypatch, tmp_path / "a", SYSTEMS, qrels, results["chosen"], "tests/toy"
    )
    assert further == results
    # Without steps they weigh the same, and nothing is said of it.
    even = {"evaluation.fusion_steps": 0}
    plain, _ = evaluated(monkeypatch, tmp_path / "d", SYSTEMS, qrels_of(1, 2), settings=even)
    assert {*plain["chosen"]} == {"expandr"}


def test_a_fusion_that_comes_to_a_finished_run_does_nothing_again(monkeypatch, tmp_path):
    before = SYSTEMS[:3]
    qrels = qrels_of(1, 2)
    first, _ = evaluated(monkeypatch, tmp_path / "a", before, qrels)
    kept = {p: p.read_bytes() for p in (tmp_path / "a" / "runs").iterdir()}
    grown, searched = evaluated(monkeypatch, tmp_path / "a", SYSTEMS, qrels)
    assert {p: p.read_bytes() for p in kept} == kept
    # Of the test queries nothing is encoded again; of dev, what the parts' runs there need.
    assert {count for _, count in searched} == {len(DEV), 2 * len(DEV)}
    at_once, _ = evaluated(monkeypatch, tmp_path / "b", SYSTEMS, qrels)
    assert grown == at_once
    assert first["chosen"]["expandr"] == grown["chosen"]["expandr"]
    for name in ("results.json", "evaluation/choices.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_that_began_before_there_were_weights_keeps_equal_ones(monkeypatch, tmp_path):
    config = read_config(smoke_config.get_config())
    run = Run(tmp_path, config, Console(file=io.StringIO()))
    run.close()
    assert run.config.evaluation.fusion_steps == 10
    record = json.loads((tmp_path / "config.json").read_text())
    del record["config"]["evaluation"]["fusion_steps"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "work").mkdir(exist_ok=True)
    run = Run(tmp_path, config, Console(file=io.StringIO()))
    run.close()
    expected = dataclasses.replace(config.evaluation, fusion_steps=0)
    assert run.config == dataclasses.replace(run.config, evaluation=expected)
    assert json.loads((tmp_path / "config.json").read_text()) == record
