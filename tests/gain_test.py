"""The search of a candidate, and its gain, against an example by hand and plain rankings."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from configs import base
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.registry import (
    check_answers,
    needs_vectors,
    reward_groups,
    score_groups,
)
from expandr_jax.rewards.search import SEARCH_MEASURES
from expandr_jax.rewards.searches import REWARD_SEARCHES, corpus_reward, gain_reward
from expandr_jax.search import Bm25Index
from expandr_jax.vectors.corpus import Corpus
from train.scores import RewardTools, reward_context

ANSWERS = {"axis norm": ("no such", "Loss,  matrix!"), "loss shape": ("(tensor) norm",)}
WORDS = ["axis", "norm", "loss", "array", "scalar", "matrix", "tensor", "shape"]


def make_config(**reward):
    config = base.get_config()
    config.reward.update({"query_weight": 0.5, "depth": 7, "corpus_temperature": 0.3, **reward})
    return read_config(config)


def make_evidence(config, documents, qrels, texts, queries, candidates):
    """Evidence of texts by query; `documents` is id -> (text, vector), the rest vectors."""
    collection = Collection(
        "c", {d: text for d, (text, _) in documents.items()}, dict(texts), {"train": qrels}, ANSWERS
    )
    data = TrainingData(collection, [], list(texts))
    groups = [
        Group(query, query, data.positive(query), "", [Candidate(text) for text in own])
        for query, own in texts.items()
    ]
    vectors = np.array([vector for _, vector in documents.values()], np.float32)
    corpus = Corpus(list(documents), vectors, dataclasses.replace(config.search, backend="exact"))
    queries, candidates = (np.array(x, np.float32) for x in (queries, candidates))
    tools = RewardTools(lambda: Bm25Index(collection.corpus.values()))
    context = reward_context(config, tools, data, corpus, list(texts), 100, 0)
    return Evidence(context, groups, queries, candidates, queries)


def test_an_example_by_hand():
    """1 / rank with a candidate less 1 / rank without; a candidate has three quarters of a vector.

    The document on "axis" is third for it, behind (1, 0) and (0.8, 0.6). With (0, 1) it is first,
    and "loss" stands in it alone. The one on "norm" is first, and second with what means others.
    """
    documents = {
        "d0": ("axis axis", [1.0, 0.0]),
        "d1": ("axis norm", [0.8, 0.6]),
        "d2": ("axis norm loss", [0.0, 1.0]),
    }
    arguments = (
        documents,
        {"axis": {"d2": 1}, "norm": {"d1": 1}},
        {"axis": ["loss", "axis axis"], "norm": ["loss loss loss", "axis axis"]},
        [[1.0, 0.0], [0.8, 0.6]],
        [[[0.0, 1.0], [1.0, 0.0]]] * 2,
    )
    expected = {"dense": [[2 / 3, 0], [-1 / 2, -1 / 2]], "bm25": [[2 / 3, 0], [-1 / 2, 0]]}
    for search, gains in expected.items():
        config = make_config(
            gain_measure="reciprocal_rank", search=search, depth=3, query_weight=0.25
        )
        np.testing.assert_allclose(gain_reward(make_evidence(config, *arguments)), gains)


def plain_measure(measure, found, scores, grades):
    """A measure of one ranking, a document at a time."""
    found, scores = zip(
        *[(d, s) for d, s in zip(found, scores, strict=True) if d >= 0], strict=True
    )
    if measure == "softmax_share":
        share = np.exp(np.array(scores, np.float64) / 0.3)
        return sum(x for d, x in zip(found, share, strict=True) if d in grades) / sum(share)
    ranks = {d: i + 1 for i, d in enumerate(found)}
    if measure == "reciprocal_rank":
        return 1 / ranks[max(grades, key=grades.get)] if max(grades, key=grades.get) in ranks else 0
    if measure == "piecewise_rank":
        return max((2 - (ranks[d] - 1) / 9 for d in grades if d in ranks), default=0)
    if measure == "average_precision":
        there = sorted(ranks[d] for d in grades if d in ranks)
        return sum((i + 1) / rank for i, rank in enumerate(there)) / len(grades)
    gains = sum(g / np.log2(1 + ranks[d]) for d, g in grades.items() if d in ranks)
    return gains / sum(g / np.log2(i + 2) for i, g in enumerate(sorted(grades.values())[::-1]))


@pytest.fixture
def arguments():
    rng = np.random.default_rng(0)
    units = rng.normal(size=(30, 6))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    documents = {f"d{i}": (" ".join(rng.choice(WORDS, 5)), unit) for i, unit in enumerate(units)}
    qrels = {"axis norm": {"d3": 1, "d20": 2}, "loss shape": {"d11": 1}}
    texts = {q: [" ".join(rng.choice(WORDS, 4)) for _ in range(3)] + [""] for q in qrels}
    candidates = rng.normal(size=(2, 4, 6))
    candidates[:, 3] = 0
    return documents, qrels, texts, rng.normal(size=(2, 6)), candidates


def unit(x):
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("measure", SEARCH_MEASURES)
@pytest.mark.parametrize("search", REWARD_SEARCHES)
def test_they_are_those_of_plain_rankings(arguments, measure, search):
    documents, qrels, texts, queries, candidates = arguments
    measures = {"gain_measure": measure, "corpus_measure": measure}
    evidence = make_evidence(make_config(search=search, **measures), *arguments)
    found, whole = gain_reward(evidence), corpus_reward(evidence)
    vectors = np.array([vector for _, vector in documents.values()])

    def ranked(scores, depth=7):
        order = np.argsort(-scores, kind="stable")[:depth]
        return [d for d in order if scores[d] != 0], [scores[d] for d in order if scores[d] != 0]

    def worth(q, query, text, vector):
        grades = {int(d[1:]): g for d, g in qrels[query].items()}
        plain = unit(queries[q])

        def measured(found, scores):
            if measure != "hit":
                return plain_measure(measure, found, scores, grades)
            pairs = [[*itertools.pairwise(documents[f"d{d}"][0].split())] for d in found if d >= 0]
            wanted = (("loss", "matrix"), ("tensor", "norm"))[q]
            return float(any(wanted in own for own in pairs))

        dense = ranked(vectors @ (unit((plain + unit(vector)) / 2) if text else plain))
        words = " ".join([query] * 5 + [text]) if text else query
        sparse = ranked(bm25_scores([t for t, _ in documents.values()], words))
        if search == "fused":
            total = np.zeros(30)
            for order, _ in (dense, sparse):
                for rank, document in enumerate(order, start=1):
                    total[document] += 1 / (60 + rank)
            met = list(dict.fromkeys([*dense[0], *sparse[0]]))
            met.sort(key=lambda d: -total[d])
            return measured(met[:7], [total[d] for d in met[:7]])
        return measured(*{"dense": dense, "bm25": sparse}[search])

    for q, (query, own) in enumerate(texts.items()):
        before = worth(q, query, "", None)
        for c, text in enumerate(own):
            expected = worth(q, query, text, candidates[q, c])
            np.testing.assert_allclose(whole[q, c], expected, atol=1e-5)
            np.testing.assert_allclose(found[q, c], expected - before, atol=1e-5)
    assert (found[:, 3] == 0).all()  # An empty candidate adds nothing.
    assert np.abs(found).max() > 1e-3


def bm25_scores(documents, query, k1=0.9, b=0.4):
    """Lucene's formula, a word at a time."""
    split = [document.split() for document in documents]
    mean = np.mean([len(words) for words in split])
    scores = np.zeros(len(split))
    for word in query.split():
        holding = sum(word in words for words in split)
        idf = np.log(1 + (len(split) - holding + 0.5) / (holding + 0.5))
        for i, words in enumerate(split):
            count = words.count(word)
            scores[i] += idf * count / (count + k1 * (1 - b + b * len(words) / mean))
    return scores


def test_it_may_be_below_zero_and_counts_with_its_weight(arguments):
    evidence = make_evidence(make_config(gain=2.0, positive=0.0, answer=0.0), *arguments)
    gains = gain_reward(evidence)
    assert gains.min() < 0
    totals = [[c.total for c in group.candidates] for group in reward_groups(evidence)]
    np.testing.assert_allclose(totals, 2 * gains)


def test_it_is_the_same_whatever_is_in_memory_at_once(arguments, monkeypatch):
    for search in REWARD_SEARCHES:
        config = make_config(search=search)
        whole = gain_reward(make_evidence(config, *arguments))
        with monkeypatch.context() as patch:
            patch.setattr("expandr_jax.rewards.search.BLOCK_ROWS", 5)
            parts = gain_reward(make_evidence(config, *arguments))
        np.testing.assert_array_equal(parts, whole)


def test_what_has_a_weight_is_all_that_is_computed(arguments):
    """Without self-answers, and without vectors where words alone are searched for."""
    weights = {"positive": 0.5, "answer": 0.0, "gain": 2.0, "corpus": 1.0}
    evidence = make_evidence(make_config(**weights), *arguments)
    bare = dataclasses.replace(evidence, answers=None)
    for group, other in zip(reward_groups(evidence), score_groups(bare), strict=True):
        for expected, found in zip(group.candidates, other.candidates, strict=True):
            assert set(expected.rewards) == {"positive", "answer", "gain", "corpus"}
            assert dict(found.rewards) == {n: expected.rewards[n] for n in weights if n != "answer"}
            assert found.total == expected.total
            assert found.similarities == {"positive": expected.similarities["positive"]}
        # Such a line is read as it is written.
        assert Group.from_row(other.to_row()).candidates == other.candidates
    words = make_config(**{**weights, "positive": 0.0}, search="bm25")
    assert needs_vectors(make_config(**weights).reward)
    assert not needs_vectors(words.reward)
    context = dataclasses.replace(evidence.context, settings=words.reward)
    expected = score_groups(dataclasses.replace(evidence, context=context))
    found = score_groups(Evidence(dataclasses.replace(context, corpus=None), evidence.groups))
    assert [g.to_row()["candidates"][0]["reward_terms"] for g in found] == [
        g.to_row()["candidates"][0]["reward_terms"] for g in expected
    ]
    assert all(set(c.rewards) == {"gain", "corpus"} for group in found for c in group.candidates)


@pytest.mark.parametrize("name", ["positive", "answer", "group", "corpus", "gain"])
def test_vectors_are_asked_for_where_a_reward_looks_at_them(arguments, name):
    """`needs_vectors` against what a reward does without them."""
    names = ("positive", "answer", "group", "corpus", "gain")
    for search in REWARD_SEARCHES:
        config = make_config(search=search, **{n: float(n == name) for n in names})
        whole = make_evidence(config, *arguments)
        context = dataclasses.replace(whole.context, corpus=None)
        bare = dataclasses.replace(whole, context=context, queries=None, candidates=None)
        if needs_vectors(config.reward):
            with pytest.raises((AttributeError, TypeError, KeyError)):
                score_groups(bare)
        else:
            assert [g.texts for g in score_groups(bare)] == [g.texts for g in whole.groups]


def test_what_a_search_or_a_measure_looks_at_is_asked_of_its_record(monkeypatch):
    """And not of its name: others may be added."""
    words = REWARD_SEARCHES["bm25"]
    monkeypatch.setitem(REWARD_SEARCHES, "mine", words)
    measure = dataclasses.replace(SEARCH_MEASURES["ndcg"], answers=True, scores=True)
    monkeypatch.setitem(SEARCH_MEASURES, "ours", measure)
    given = {"positive": 0.0, "answer": 0.0, "gain": 1.0, "search": "mine", "gain_measure": "ours"}
    config = with_settings(make_config(), {f"reward.{name}": of for name, of in given.items()})
    assert not needs_vectors(config.reward)
    collection = types.SimpleNamespace(answers={})
    data = types.SimpleNamespace(collection=collection, generator_train=["q"])
    with pytest.raises(UserError, match=r"^reward\.gain_measure is 'ours', and no query"):
        check_answers(config.reward, data)
    collection.answers["q"] = ("yes",)
    check_answers(config.reward, data)
    config = with_settings(config, {"contrastive.normalize": "none"})
    assert [name for name, _ in config.refused()] == ["contrastive.normalize"]
