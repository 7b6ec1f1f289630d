"""Mined negatives: against a plain loop over random searches, and the reasons to leave one out."""

import collections
import contextlib
import types

import numpy as np
import pytest

from configs import base
from expandr_jax.config import read_config
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.data.triples import read_triples
from expandr_jax.files.records import read_jsonl, write_jsonl
from expandr_jax.mining import mine_negatives, triple_rows
from expandr_jax.objectives.figret import find_failed
from expandr_jax.objectives.negatives import mine_triples
from expandr_jax.runtime.processes import Processes
from expandr_jax.search import ExactIndex
from expandr_jax.vectors.corpus import Corpus

DOCUMENTS = ["right", "near", "near ", "far", "also right", "", "last", "right"]


def mine(scores, indices, positives, positive_score=1.0, **settings):
    """The negatives of a single query."""
    found = np.array([scores], np.float32), np.array([indices])
    return mine_negatives(*found, [positive_score], [positives], DOCUMENTS, **settings)[0]


def test_right_repeated_and_empty_documents_are_left_out():
    # 7 has the text of 0, 2 that of 1, 5 none.
    indices = [0, 7, 1, 2, 5, 4, 3, 6]
    assert mine(np.linspace(1, 0.3, 8), indices, [0, 4], count=8) == [1, 3, 6]
    assert mine(np.linspace(1, 0.3, 8), indices, [0, 4], count=2) == [1, 3]


def test_the_first_results_are_left_out():
    assert mine([4, 3, 2], [1, 3, 6], [0], 9.0, count=4, first=1) == [3, 6]


def test_margins():
    scores, indices = [0.95, 0.9, 0.5], [1, 3, 6]
    assert mine(scores, indices, [0], count=3, absolute_margin=0.06) == [3, 6]
    assert mine(scores, indices, [0], 0.5, count=3, relative_margin=0.0) == [6]
    assert mine(scores, indices, [0], count=3, relative_margin=0.1, absolute_margin=0.2) == [6]
    # A negative score falls further with a margin.
    assert mine([-1.04, -1.06], [1, 3], [0], -1.0, count=2, relative_margin=0.05) == [3]


def test_it_equals_a_plain_loop():
    random = np.random.default_rng(0)
    documents = [f"text {i % 30}" for i in range(40)]
    indices = np.stack([random.permutation(40)[:25] for _ in range(50)])
    scores = -np.sort(-random.normal(size=(50, 25)), axis=1)
    right = [random.integers(0, 40, 2).tolist() for _ in range(50)]
    level = random.normal(size=50) + 1
    mined = mine_negatives(
        scores, indices, level, right, documents, count=4, first=2, absolute_margin=0.1
    )
    for query in range(50):
        expected = []
        for rank in range(2, 25):
            document = int(indices[query, rank])
            texts = {documents[d] for d in expected} | {documents[d] for d in right[query]}
            near = scores[query, rank] > level[query] - 0.1
            if not near and documents[document] not in texts and len(expected) < 4:
                expected.append(document)
        assert mined[query] == expected
    assert any(len(row) == 4 for row in mined)


def test_rows_are_triples(tmp_path):
    rows = triple_rows(["q", "r"], [[5, 0], [4, 1]], [[3, 6], []], DOCUMENTS)  # 5 has no text.
    write_jsonl(tmp_path / "triples.jsonl", rows)
    triples, _ = read_triples(tmp_path / "triples.jsonl")
    assert [(t.query, t.positives, t.negatives) for t in triples] == [
        ("q", ("right",), ("far", "last")),
        ("r", ("also right", "near"), ()),
    ]


def test_shapes_and_ranges_are_checked():
    with pytest.raises(ValueError, match="queries"):
        mine_negatives(np.ones((2, 3)), np.ones((2, 3), int), [1.0], [[0]], DOCUMENTS, count=1)
    with pytest.raises(ValueError, match="positive_scores"):
        mine_negatives(np.ones((1, 3)), np.ones((1, 3), int), [], [[0]], DOCUMENTS, count=1)
    with pytest.raises(ValueError, match="expected 1 and 0 or more"):
        mine([1.0], [1], [0], count=0)


class Read(collections.UserList):
    """Texts that know which of them were read."""

    def __init__(self, texts):
        super().__init__(texts)
        self.read = set()

    def __getitem__(self, row):
        self.read.add(row)
        return super().__getitem__(row)


def world(monkeypatch, ids, vectors, queries, excluded=(), settings=()):
    """A config, data, a retriever and texts: queries' vectors and relevant documents are rows."""
    config = base.get_config()
    config.search.backend = "exact"
    config.mining.update({"per_query": 3, "depth": 20, "first": 0})
    config.update_from_flattened_dict(dict(settings))
    config = read_config(config)
    corpus, texts = Corpus(ids, vectors, config.search), Read(f"text of {d}" for d in ids)
    monkeypatch.setattr("expandr_jax.objectives.negatives.texts_of", lambda _: texts)
    qrels = {"train": {query: {ids[int(query[1:])]: 1} for query in queries}}
    texts_of_queries = {query: query for query in queries}
    collection = Collection("c", dict.fromkeys(ids, ""), texts_of_queries, qrels)
    collection.excluded["q1"] = excluded
    data = TrainingData(collection, queries, [])
    reporter = types.SimpleNamespace(
        progress=lambda *_: contextlib.nullcontext(lambda _: None), say=lambda _: None
    )
    retriever = types.SimpleNamespace(
        corpus=corpus,
        processes=Processes(),
        reporter=reporter,
        encode=lambda queries, *_, **__: vectors[[int(q[1:]) for q in queries]],
    )
    return config, data, retriever, texts


def mined(tmp_path, monkeypatch, *args, **evaluation):
    """What is mined for two queries, and the texts."""
    settings = {f"evaluation.{name}": value for name, value in evaluation.items()}
    config, data, retriever, texts = world(monkeypatch, *args, settings=settings)
    ids, drop = data.retriever_train, config.evaluation.drop_identical_ids
    mine_triples(config.mining, drop, retriever, data, ids, tmp_path / "triples.jsonl")
    return negatives(tmp_path / "triples.jsonl"), texts


def negatives(path):
    return [row["neg"] for _, row in read_jsonl(path, {"neg": list})]


def test_mining_reads_the_documents_that_it_takes_and_no_others(tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(3_000, 8)).astype(np.float32)
    ids = [f"d{row}" for row in range(len(vectors))]
    found, texts = mined(tmp_path, monkeypatch, ids, vectors, ["q0", "q1"])
    assert list(map(len, found)) == [3, 3]
    assert len(texts.read) <= 2 * (1 + 3)


@pytest.mark.parametrize("drop", [True, False])
def test_a_query_is_no_negative_of_itself(tmp_path, monkeypatch, drop):
    """As in ArguAna, where each query is a document, by its own id."""
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    ids = [f"d{row}" for row in range(30)]
    ids[20], vectors[20] = "q0", 0.99 * vectors[0]
    found, _ = mined(tmp_path, monkeypatch, ids, vectors, ["q0", "q1"], drop_identical_ids=drop)
    assert ("text of q0" in found[0]) != drop
    assert list(map(len, found)) == [3, 3]


def test_what_is_excluded_for_a_query_is_no_negative_of_it(tmp_path, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    vectors[7], vectors[8] = 0.99 * vectors[1], 0.98 * vectors[1]
    ids = [f"d{row}" for row in range(30)]
    excluded = "d7", "d8"
    found, _ = mined(tmp_path, monkeypatch, ids, vectors, ["q0", "q1"], excluded)
    assert len(found[1]) == 3
    assert not {"text of d7", "text of d8"} & {*found[1]}


def test_queries_are_mined_some_at_a_time(tmp_path, monkeypatch):
    """Vectors of all of them, and what was found, were in the memory of each process at once."""
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    ids, queries = [f"d{row}" for row in range(30)], [f"q{i}" for i in range(7)]
    found, _ = mined(tmp_path, monkeypatch, ids, vectors, queries)
    whole = (tmp_path / "triples.jsonl").read_bytes()
    monkeypatch.setattr("expandr_jax.objectives.negatives.QUERIES_AT_ONCE", 3)
    searched, search = [], ExactIndex.search
    monkeypatch.setattr(
        ExactIndex, "search", lambda self, q, k: searched.append(len(q)) or search(self, q, k)
    )
    assert mined(tmp_path, monkeypatch, ids, vectors, queries)[0] == found
    assert (tmp_path / "triples.jsonl").read_bytes() == whole
    assert searched == [3, 3, 1]


@pytest.mark.parametrize("margin", ["relative_margin", "absolute_margin"])
def test_a_query_that_fails_has_wrong_documents_whatever_the_margin(tmp_path, monkeypatch, margin):
    """All that is looked at scores above its relevant document, from which a margin is counted."""
    vectors = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    ids = [f"d{row}" for row in range(30)]
    settings = {f"mining.{margin}": 0.0}
    config, data, retriever, _ = world(monkeypatch, ids, vectors, ["q0"], settings=settings)
    retriever.encode = lambda queries, *_, **__: -vectors[[int(q[1:]) for q in queries]]
    mine_triples(config.mining, False, retriever, data, ["q0"], tmp_path / "all.jsonl")
    assert negatives(tmp_path / "all.jsonl") == [[]]
    drop = config.evaluation.drop_identical_ids
    find_failed(5, 0, config.mining, drop, data, retriever, tmp_path / "failed.jsonl")
    found = np.argsort(vectors @ vectors[0])[:3]
    assert negatives(tmp_path / "failed.jsonl") == [[f"text of d{row}" for row in found]]
