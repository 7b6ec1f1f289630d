"""Systems ranked on a toy corpus, against their formulas in numpy."""

import dataclasses
import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from expandr_jax import metrics
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.ranking.choices import Choice, choose
from expandr_jax.ranking.ranker import Expansions, Ranker, Searches
from expandr_jax.ranking.rerank import RERANKERS, Reranker
from expandr_jax.ranking.systems import parse_system
from expandr_jax.search import Bm25Index, search_named
from expandr_jax.vectors.corpus import Corpus

CORPUS = {f"d{i}": text for i, text in enumerate(
    ["pad an array", "sort a list", "scale a matrix", "array of zeros", "list a shape", "sort"]
)}  # fmt: skip
QUERIES = {"a": "pad array", "b": "sort list"}
TEXTS = {"a": ["pad it", "", "with zeros"], "b": ["", "", ""]}
SETTINGS = ConfigDict(
    {"depth": 5, "drop_identical_ids": False, "rerank": {"depth": 2, "depths": ()}}
)
SEARCH = dataclasses.replace(read_config(base.get_config()).search, backend="exact")


def vector(text):
    """A fixed direction for a text."""
    seed = np.frombuffer(text.encode(), np.uint8)
    x = np.random.default_rng(seed).normal(size=8).astype(np.float32)
    return x / np.linalg.norm(x)


def encode(texts, kind, ids):
    assert len(texts) == len(ids)
    return np.stack([vector(f"{kind} {text}") for text in texts])


DOCUMENTS = encode(list(CORPUS.values()), "document", list(CORPUS))


ALL = Choice(0.7, 3)


def ranker(choice=ALL, strategy="q2d", search=SEARCH, **options):
    index = Bm25Index(list(CORPUS.values()))
    corpus = Corpus(list(CORPUS), DOCUMENTS, search)
    dense = types.SimpleNamespace(encode=encode, corpus=corpus, separator="", normalize="both")
    return Ranker(
        QUERIES,
        Searches(lambda _: index, lambda *_: dense, CORPUS),
        lambda _: Expansions(STRATEGIES[strategy], [[TEXTS[query]] for query in QUERIES]),
        lambda system: None if system.parts else choice,  # Parts of a fusion weigh the same.
        SETTINGS,
        **options,
    )


def unit(x):
    return x / np.linalg.norm(x)


def expanded(query, texts, weight):
    plain, texts = vector(f"query {QUERIES[query]}"), [t for t in texts if t]
    if not texts:
        return plain
    return unit(
        weight * plain + (1 - weight) * np.mean([vector(f"document {t}") for t in texts], 0)
    )


def scores(x):
    """The best five documents of a query's vector."""
    found = dict(zip(CORPUS, DOCUMENTS @ x, strict=True))
    return dict(sorted(found.items(), key=lambda pair: -pair[1])[:5])


def assert_run(run, expected):
    assert run.keys() == expected.keys()
    for query, found in run.items():
        assert found == pytest.approx(expected[query], abs=1e-5)
        assert list(found) == list(expected[query])


def test_a_leaf_searches_by_the_mean_of_its_query_and_the_texts_that_it_uses():
    system = parse_system("zero-shot+expansion")
    for samples in (1, 2, 3):
        run = ranker(Choice(0.7, samples)).rank(system)
        expected = {q: scores(expanded(q, TEXTS[q][:samples], 0.7)) for q in QUERIES}
        assert_run(run, expected)
    # One of the texts is empty: (q + d1 + d3) / 3.
    run = ranker(strategy="hyde").rank(parse_system("dense+hyde"))
    assert_run(run, {q: scores(expanded(q, TEXTS[q], 1 / 3)) for q in QUERIES})


def test_bm25_searches_for_the_words_of_the_strategy():
    run = ranker(strategy="q2e").rank(parse_system("bm25+q2e"))
    queries, search = ["pad array pad it with zeros", "sort list"], Bm25Index(list(CORPUS.values()))
    options = {"drop_identical_ids": False, "above": 0.0}
    expected = search_named(search.search, "ab", queries, list(CORPUS), 5, **options)
    assert_run(run, metrics.as_written(expected))


def test_feedback_moves_the_vector_that_its_system_searches_by():
    run = ranker().rank(parse_system("zero-shot+expansion+prf-average"))
    expected = {}
    for query in QUERIES:
        x = expanded(query, TEXTS[query], 0.7)
        top = [DOCUMENTS[int(document[1:])] for document in list(scores(x))[:3]]
        expected[query] = scores((x + sum(top)) / 4)
    assert_run(run, expected)


@pytest.mark.parametrize("method", ["prf-average", "prf-rocchio"])
def test_feedback_of_a_query_that_found_fewer_leaves_the_others_their_own(method):
    """Whatever else is ranked, a query moves towards as many documents as it has found itself."""
    vectors = np.stack([vector(f"query {text}") for text in QUERIES.values()])
    for found in ({"a": 3, "b": 2}, {"a": 3, "b": 0}, {"a": 0, "b": 0}):
        mine = ranker()
        mine._runs["dense"] = {
            q: {f"d{i}": 9.0 - i for i in range(count)} for q, count in found.items() if count
        }
        expected = []
        for x, count in zip(vectors, found.values(), strict=True):
            if method == "prf-average":
                expected.append((x + DOCUMENTS[:count].sum(0)) / (count + 1))
            else:
                expected.append(0.9 * x + 0.1 * DOCUMENTS[:count].mean(0) if count else x)
        moved = mine.query_vectors(parse_system(f"dense+{method}"), None)
        np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_the_recall_of_an_index_is_told_where_it_may_miss_documents(monkeypatch):
    mine = ranker()
    assert mine.index_recall(parse_system("dense")) is None
    monkeypatch.setattr(Corpus, "approximate", True)
    assert ranker().index_recall(parse_system("dense")) is None  # It is not what is searched.
    by_index = dataclasses.replace(SEARCH, evaluation="index")
    monkeypatch.setattr(Corpus, "recall", lambda corpus, queries, k: len(queries) / k)
    mine = ranker(search=by_index)
    for name in ("dense", "zero-shot+expansion", "dense+prf-average"):
        expected = {"system": name, "queries": 2, "recall@5": 0.4}
        assert mine.index_recall(parse_system(name)) == expected
    for name in ("bm25", "rrf:bm25:dense"):
        assert mine.index_recall(parse_system(name)) is None
    other = ranker(search=by_index, choice=None, is_main=False)
    assert other.index_recall(parse_system("dense")) is None


def test_a_fusion_of_a_fusion():
    mine = ranker()
    run = mine.rank(parse_system("rrf:bm25:interpolation:dense:zero-shot+expansion"))
    parts = [mine.rank(parse_system(name)) for name in ("dense", "zero-shot+expansion")]
    for query in QUERIES:
        scaled = {}
        for found in (part[query] for part in parts):
            low, high = min(found.values()), max(found.values())
            for document, score in found.items():
                scaled[document] = scaled.get(document, 0) + (score - low) / (high - low) / 2
        inner = sorted(scaled, key=scaled.get, reverse=True)[:5]
        rankings = [list(mine.rank(parse_system("bm25")).get(query, {})), inner]
        for document, score in run[query].items():
            ranks = [r.index(document) + 1 for r in rankings if document in r]
            assert score == pytest.approx(sum(1 / (60 + rank) for rank in ranks), abs=1e-6)


def test_a_re_ranker_orders_the_first_documents_and_the_others_follow(monkeypatch):
    read = []

    def score(query, documents):
        read.extend((query, document) for document in documents)
        return np.array([len(query) - len(document) for document in documents], np.float32)

    monkeypatch.setitem(RERANKERS, "rerank", Reranker(lambda _: None, lambda *_: score))
    system = parse_system("rerank:rrf:bm25:dense")
    assert [part.name for part in system.parts] == ["rrf:bm25:dense"]
    before = ranker().rank(system.parts[0])
    run = ranker().rank(system)
    for query, text in QUERIES.items():
        first, rest = list(before[query])[:2], list(before[query])[2:]
        expected = {d: float(len(text) - len(CORPUS[d])) for d in first}
        assert {(text, CORPUS[d]) for d in first} <= {*read}
        low = min(expected.values())
        assert run[query] == pytest.approx(
            expected | {d: low - n for n, d in enumerate(rest, start=1)}, abs=1e-5
        )
        assert list(run[query])[2:] == rest
    assert len(read) == 4
    nested = parse_system("interpolation:rerank:dense:bm25")
    assert [part.name for part in nested.parts] == ["rerank:dense", "bm25"]
    with pytest.raises(UserError, match="expected a system to rank again, rerank:dense"):
        parse_system("rrf:dense:rerank")


def test_a_run_is_kept_in_its_file_and_read_from_there(tmp_path):
    system = parse_system("rrf:bm25:dense")
    run = ranker(directory=tmp_path).rank(system)
    assert run == ranker().rank(system)
    assert {path.name for path in tmp_path.iterdir()} == {
        "rrf:bm25:dense.trec", "bm25.trec", "dense.trec",
    }  # fmt: skip
    metrics.write_trec(tmp_path / "dense.trec", {"a": {"d1": 1.0}}, "dense")
    assert ranker(directory=tmp_path).rank(parse_system("dense")) == {"a": {"d1": 1.0}}


def test_other_processes_encode_and_search_nothing():
    other = ranker(choice=None, is_main=False)
    for name in ("bm25+expansion", "zero-shot+expansion", "rrf:bm25:dense+prf-average"):
        assert other.rank(parse_system(name)) == {}
    assert other.encoded(parse_system("zero-shot+expansion")).expansions.shape == (2, 3, 8)


def test_of_equal_choices_the_first_is_the_best():
    qrels = {"a": {"d0": 1}, "b": {"d1": 1}}
    choices = [Choice(weight, samples) for samples in (1, 3) for weight in (0.5, 1.0)]
    leaf = parse_system("zero-shot+expansion")
    tried = choose(ranker(), leaf, qrels, choices)
    assert [choice for choice, _ in tried] == choices
    for choice, value in tried:
        found = metrics.evaluate(ranker(choice).rank(leaf), qrels, ("ndcg@10",))["ndcg@10"]
        assert value == pytest.approx(metrics.mean(found))
    assert tried[1][1] == tried[3][1]  # The query alone, whatever else there is.
    tried = choose(ranker(), parse_system("bm25+expansion"), qrels, choices)
    assert [choice for choice, _ in tried] == [Choice(None, 1), Choice(None, 3)]
