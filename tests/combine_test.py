"""A query and its texts, each searched for itself and fused: worked examples, and plain Python."""

import dataclasses
import json

import numpy as np
import pytest

from configs import smoke
from expandr_jax import metrics
from expandr_jax.config import read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.expansion.combine import (
    COMBINES,
    DEV,
    MEAN,
    WAYS,
    Found,
    combined,
    found_by_vectors,
    found_by_words,
    text_weights,
)
from expandr_jax.ranking.choices import Choice, as_record, choose, expansion_grid, from_record
from expandr_jax.ranking.stages import interpolate, reciprocal_rank_fusion
from expandr_jax.ranking.systems import parse_system
from expandr_jax.search import Bm25Index, build_index
from expandr_jax.serving.cache import Expansion
from expandr_jax.serving.documents import View
from expandr_jax.serving.pair import Asked, Pair
from expandr_jax.serving.snapshots import Base
from expandr_jax.vectors.query import expanded_query, separate
from tests.choices_test import evaluated, qrels_of
from tests.ranker_test import CORPUS, DOCUMENTS, QUERIES, SETTINGS, TEXTS, ranker, vector

# Of documents a, b and c: scores of the query and of two texts, and ranks of what each has found.
FOUND = Found(
    np.array([0, 1, 2]),
    np.array([[0.5, 0.1, 0.3], [0.9, 0.2, 0.4], [0.1, 0.8, 0.1]]),
    np.array([[1, 0, 2], [1, 0, 2], [0, 1, 2]]),
)
WEIGHTS = np.array([0.6, 0.2, 0.2])


def test_the_formulas_on_an_example_by_hand():
    # a: 0.6 x 0.5 + 0.4 x 0.9; b: 0.6 x 0.1 + 0.4 x 0.8; c: 0.6 x 0.3 + 0.4 x 0.4.
    np.testing.assert_allclose(COMBINES["max"](FOUND, WEIGHTS), [0.66, 0.38, 0.34])
    # Scaled: the query 1, 0, 1/2; the first text 1, 0, 2/7; the second 0, 1, 0.
    np.testing.assert_allclose(
        COMBINES["mean-score"](FOUND, WEIGHTS), [0.8, 0.2, 0.3 + 0.2 * 2 / 7]
    )
    np.testing.assert_allclose(
        COMBINES["rrf"](FOUND, WEIGHTS), [0.6 / 61 + 0.2 / 61, 0.2 / 61, 1 / 62]
    )
    scores, rows = combined([FOUND], [WEIGHTS], "max", 2)
    assert [each.tolist() for each in rows] == [[0, 1]]
    np.testing.assert_allclose(scores[0], [0.66, 0.38])


def test_the_texts_share_what_the_query_leaves():
    np.testing.assert_allclose(text_weights(0.6, 2), WEIGHTS)
    assert text_weights(0.6, 0).tolist() == [1.0]
    alone = Found(FOUND.rows, FOUND.scores[:1], FOUND.ranks[:1])
    for how in COMBINES:
        (rows,) = combined([alone], [np.array([1.0])], how, 3)[1]
        assert rows[0] == 0


def test_two_relevant_documents_near_two_passages_are_found_by_max_and_not_by_the_mean():
    first, second, query = np.eye(3, dtype=np.float32)
    between = (first + second) / np.sqrt(2)
    documents = np.stack([between, first, between, second, between])  # 1 and 3 are relevant.
    index = build_index(documents, "exact")
    mean = expanded_query(
        query[None], np.stack([first, second])[None], np.ones((1, 2), bool), query_weight=0.5,
        normalize="both",
    )  # fmt: skip
    _, rows = index.search(np.asarray(mean), 3)
    assert {*rows[0].tolist()} == {0, 2, 4}
    asked = [separate(query, np.stack([first, second]), "both")]
    found = found_by_vectors(index.search, documents, asked, 5)
    _, rows = combined(found, [text_weights(0.5, 2)], "max", 2)
    assert {*rows[0].tolist()} == {1, 3}


def test_a_document_that_one_search_alone_finds_has_its_exact_scores_in_all():
    asked = [np.stack([vector(f"{n} {i}") for i in range(3)]) for n in "ab"]
    index = build_index(DOCUMENTS, "exact")
    for found, vectors in zip(
        found_by_vectors(index.search, DOCUMENTS, asked, 2), asked, strict=True
    ):
        best = np.argsort(-(vectors @ DOCUMENTS.T), axis=1)[:, :2]
        assert {*found.rows.tolist()} == {*best.ravel().tolist()}
        assert len(found.rows) > 2
        np.testing.assert_allclose(found.scores, vectors @ DOCUMENTS[found.rows].T, atol=1e-6)
        for ranks, rows in zip(found.ranks, best, strict=True):
            assert [found.rows[ranks == rank].item() for rank in (1, 2)] == rows.tolist()
            assert (ranks > 0).sum() == 2


def searched(query, name, samples, depth):
    """Scores of each search for a query, its own first, as dictionaries."""
    texts = [text for text in TEXTS[query][:samples] if text]
    if name == "bm25+expansion":
        scores, rows = Bm25Index(list(CORPUS.values())).search([QUERIES[query], *texts], depth)
        return [
            {f"d{r}": float(s) for s, r in zip(*each, strict=True) if s > 0}
            for each in zip(scores, rows, strict=True)
        ]
    vectors = [vector(f"query {QUERIES[query]}"), *(vector(f"document {t}") for t in texts)]
    several = []
    for each in vectors:
        scores = dict(zip(CORPUS, (DOCUMENTS @ each).tolist(), strict=True))
        several.append(dict(sorted(scores.items(), key=lambda pair: -pair[1])[:depth]))
    return several


def expected(query, name, choice, depth):
    """What a leaf scores, by the formulas that fusions of systems have."""
    runs = searched(query, name, choice.samples, depth)
    rankings = [list(run) for run in runs]
    texts = len(runs) - 1
    weights = [choice.query_weight, *[(1 - choice.query_weight) / max(texts, 1)] * texts]
    if not texts:
        weights = [1.0]
    if choice.combine == "rrf":
        fused = [reciprocal_rank_fusion([ranking]) for ranking in rankings]
        return {
            document: sum(w * each.get(document, 0) for w, each in zip(weights, fused, strict=True))
            for document in {d for ranking in rankings for d in ranking}
        }
    union = sorted({document for run in runs for document in run})
    if name != "bm25+expansion":  # By vectors every document has all its scores.
        runs = [{d: run[d] for d in union} for run in searched(query, name, choice.samples, 6)]
    if choice.combine == "mean-score":
        return interpolate(runs, weights)
    if name == "bm25+expansion":
        runs = [interpolate([run], [1.0]) for run in runs]
    own, *others = runs
    if not others:
        return own
    return {
        d: weights[0] * own.get(d, 0)
        + (1 - weights[0]) * max(other.get(d, 0) for other in others)
        for d in union
    }  # fmt: skip


@pytest.mark.parametrize("name", ["zero-shot+expansion", "bm25+expansion"])
@pytest.mark.parametrize("how", COMBINES)
def test_a_leaf_s_searches_are_fused_as_systems_are(monkeypatch, name, how):
    monkeypatch.setitem(SETTINGS, "depth", 3)  # Below the six documents, so that some are missed.
    monkeypatch.setattr("expandr_jax.ranking.separate.QUERIES_AT_ONCE", 1)
    mine = ranker()
    for samples in (1, 3):
        for weight in (0.0, 0.3, 1.0):
            choice = Choice(weight, samples, how)
            run = mine.search(parse_system(name), choice)
            for query in QUERIES:
                fused = expected(query, name, choice, 3)
                best = sorted(fused.values(), reverse=True)[:3]
                assert sorted(run[query].values(), reverse=True) == pytest.approx(best, abs=1e-6)
                for document, score in run[query].items():
                    assert score == pytest.approx(fused[document], abs=1e-6)


def test_where_nothing_was_written_the_query_is_searched_alone():
    for how in COMBINES:
        for name, plain in (("zero-shot+expansion", "dense"), ("bm25+expansion", "bm25")):
            run = ranker(Choice(0.5, 3, how)).rank(parse_system(name))["b"]
            assert list(run) == list(ranker().rank(parse_system(plain))["b"])


def test_words_that_nothing_has_find_nothing():
    index = Bm25Index(list(CORPUS.values()))
    found = found_by_words(index.search, [["unheard", "of"], ["pad", "unheard"]], 4)
    for how in COMBINES:
        _, rows = combined(found, [text_weights(0.5, 1)] * 2, how, 4)
        assert [row.tolist() for row in rows] == [[], [0]]


def test_a_choice_says_how_where_it_is_no_mean():
    assert as_record(Choice(0.5, 1)) == {"query_weight": 0.5, "samples": 1}
    other = Choice(0.5, 1, "max")
    assert as_record(other) == {"query_weight": 0.5, "samples": 1, "combine": "max"}
    for choice in (Choice(0.5, 1), other):
        assert from_record(json.loads(json.dumps(as_record(choice)))) == choice


def test_dev_tries_all_ways_and_the_mean_first():
    config = read_config(smoke.get_config())  # PartWeights 0.5 and 0.9, samples 1 and 2.
    mean = [Choice(w, n) for n in (1, 2) for w in (0.5, 0.9)]
    assert expansion_grid(config.evaluation, MEAN, 1) == mean
    grid = expansion_grid(config.evaluation, DEV, 2)
    assert grid == [Choice(w, 2 * n, how) for how in WAYS for n in (1, 2) for w in (0.5, 0.9)]
    qrels = {"a": {"d0": 1}, "b": {"d1": 1}}
    settings = with_settings(config, {"evaluation.samples": (1, 3)}).evaluation
    tried = [c for c, _ in choose(
        ranker(), parse_system("bm25+expansion"), qrels, expansion_grid(settings, DEV, 1)
    )]  # fmt: skip
    assert tried[:3] == [Choice(None, 1), Choice(None, 3), Choice(0.5, 1, "max")]
    assert len(tried) == 2 + 3 * 4
    wrong = smoke.get_config()
    wrong.expansion.combine = "sum"
    with pytest.raises(UserError, match=r"expansion.combine is 'sum'; expected one of mean, max,"):
        read_config(wrong)


def test_a_run_chooses_by_its_dev_queries_how_texts_count(monkeypatch, tmp_path):
    systems = ("bm25+expansion", "expandr", "expandr+prf-average")
    ways = {"expansion.combine": DEV}
    results, _ = evaluated(monkeypatch, tmp_path / "a", systems, qrels_of(1, 2), settings=ways)
    lines = (tmp_path / "a" / "evaluation" / "choices.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for name in systems[:2]:
        tried = [row for row in rows if row["system"] == name]
        assert {row.get("combine") for row in tried} == {None, *COMBINES}
        best = max(tried, key=lambda row: row["ndcg@10"])
        assert results["chosen"][name] == {
            field: best[field] for field in best.keys() - {"system", "ndcg@10"}
        }
    assert any("combine" in chosen for chosen in results["chosen"].values())
    other, _ = evaluated(monkeypatch, tmp_path / "b", systems, qrels_of(1, 3), settings=ways)
    assert other["chosen"] == results["chosen"]
    again, searched = evaluated(
        monkeypatch, tmp_path / "a", (*systems, "bm25"), qrels_of(1, 2), settings=ways
    )
    assert again["chosen"] == results["chosen"]
    assert not searched


class Known:
    """Encodes as the toy ranker does."""

    def encode(self, texts, kinds):
        return np.stack([vector(f"{kind} {text}") for text, kind in zip(texts, kinds, strict=True)])


@pytest.mark.parametrize("how", WAYS)
def test_a_question_is_searched_for_as_the_run_s_queries_were(how):
    base = Base.of(CORPUS, DOCUMENTS, None)
    pair = Pair(Known(), View.of(base), 0.7, "both", combine=how, depth=5)
    expected = ranker(Choice(0.7, 3, how)).rank(parse_system("zero-shot+expansion"))
    asked = [
        Asked(QUERIES[query], 5, Expansion(tuple(texts), pair.passages(texts)))
        for query, texts in TEXTS.items()
    ]
    answers = pair.search([*asked, Asked(QUERIES["a"], 5)])
    for query, answer in zip(TEXTS, answers, strict=False):
        found = {hit.id: hit.score for hit in answer.hits}
        assert metrics.as_written({query: found})[query] == pytest.approx(expected[query], abs=1e-5)
        assert all(CORPUS[hit.id] == hit.text for hit in answer.hits)
    alone = ranker().rank(parse_system("dense"))["a"]
    assert [hit.id for hit in answers[-1].hits] == list(alone)
    rows = np.array([1, 4])
    limited = [dataclasses.replace(one, among=rows) for one in asked]
    for answer in pair.search(limited):
        assert {hit.id for hit in answer.hits} == {"d1", "d4"}
