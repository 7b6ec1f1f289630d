"""Rewards of a search in the corpus and in samples of it, against plain loops over documents."""

import dataclasses

import numpy as np
import pytest

from configs import base
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.rewards.answers import Answers
from expandr_jax.rewards.search import (
    SEARCH_MEASURES,
    group_reward,
    judged_documents,
    measure_searches,
    vector_search,
)
from expandr_jax.search import build_index

IDS = [f"d{i}" for i in range(50)]
# d49 is no document of the corpus, d7 not relevant; q1 has one relevant document.
QRELS = {"q0": {"d3": 1, "d40": 2, "d8": 1, "d49": 3, "d7": 0}, "q1": {"d11": 1}}
PLACE = {document: i for i, document in enumerate(IDS[:49])}
COLLECTION = Collection(
    "c", {document: f"A text: {document}." for document in PLACE},
    {query: f"text {query}" for query in QRELS}, {"train": QRELS},
    {"q0": ("d", "D40"), "q1": ("text  d11",)},
)  # fmt: skip


@pytest.fixture
def vectors():
    x = np.random.default_rng(0).normal(size=(51, 8)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture
def judged():
    data = TrainingData(COLLECTION, [], list(QRELS))
    return judged_documents(data, list(QRELS), PLACE)


def fused(vectors, seed=1):
    """[queries, candidates, dim]; the first candidate of query 0 is its best document's vector."""
    x = np.random.default_rng(seed).normal(size=(2, 4, 8)).astype(np.float32)
    x[0, 0] = vectors[40]
    return x


def corpus_reward(config, index, fused, judged):
    """The reward `corpus`, as evaluation computes it, too."""
    reward = config.reward
    search = vector_search(index, fused, reward.depth + judged.left_out.shape[1])
    how = reward.corpus_measure, reward.corpus_temperature, Answers(COLLECTION), reward.depth
    return measure_searches(search, judged, fused.shape[1], *how)


def group(config, vectors, fused, judged):
    """The reward `group`."""
    sizes = {"sets": config.reward.group_sets, "size": config.reward.group_size}
    return group_reward(vectors, fused, judged, seed=config.seed, **sizes)


def make_config(**reward):
    config = base.get_config()
    config.reward.update(reward)
    return config


def test_right_documents_stand_by_grade_and_rows_are_filled_up(judged):
    np.testing.assert_array_equal(judged.documents, [[40, 3, 8], [11, -1, -1]])
    np.testing.assert_array_equal(judged.grades, [[2, 1, 1], [1, 0, 0]])


def plain(measure, order, grades, scores):
    """A measure of one ranking, a document at a time; grades and scores by document."""
    if measure == "softmax_share":
        share = {d: float(np.exp(np.float64(scores[d]) / 0.3)) for d in order}
        return sum(share[d] for d in order if d in grades) / sum(share.values())
    if measure == "reciprocal_rank":
        best = max(grades, key=grades.get)
        return 1 / (order.index(best) + 1) if best in order else 0.0
    if measure == "hit":  # The best document alone holds an answer.
        return float(max(grades, key=grades.get) in order)
    if measure == "piecewise_rank":
        rank = min((order.index(d) + 1 for d in grades if d in order), default=101)
        return 2 - (rank - 1) / 9 if rank <= 10 else max(0, 1 - (rank - 10) / 90)
    if measure == "average_precision":
        precisions = [
            sum(d in grades for d in order[: i + 1]) / (i + 1)
            for i, document in enumerate(order)
            if document in grades
        ]
        return sum(precisions) / len(grades)
    ideal = sorted(grades.values(), reverse=True)
    total = sum(grades.get(d, 0) / np.log2(i + 2) for i, d in enumerate(order))
    return total / sum(g / np.log2(i + 2) for i, g in enumerate(ideal))


def test_documents_that_evaluation_leaves_out_count_in_no_reward(vectors):
    """A query's own document, and what is excluded for it, as if the corpus were without them."""
    queries = {"d5": {"d3": 1, "d40": 2}, "q1": {"d11": 1}}
    collection = dataclasses.replace(
        COLLECTION, qrels={"train": queries}, queries=dict.fromkeys(queries, "text"),
        excluded={"d5": ("d6", "none of the corpus")},
    )  # fmt: skip
    data = TrainingData(collection, [], [*queries])
    assert data.left_out("d5", True) == ["d5", "d6"]
    assert data.left_out("d5", False) == ["d6"]
    judged = judged_documents(data, [*queries], PLACE, drop_identical_ids=True)
    np.testing.assert_array_equal(judged.left_out, [[5, 6], [-1, -1]])
    x = fused(vectors)
    x[0, 1:3] = vectors[5:7]  # They are found first, if they are found.
    corpus = vectors[:49]
    rows = np.delete(np.arange(49), [5, 6])
    for measure in ("reciprocal_rank", "ndcg", "softmax_share"):
        for depth in (3, 10, 49):
            config = make_config(corpus_measure=measure, corpus_temperature=0.3, depth=depth)
            found = corpus_reward(config, build_index(corpus, "exact"), x, judged)
            for q, (grades, own) in enumerate([({40: 2, 3: 1}, rows), ({11: 1}, np.arange(49))]):
                for c in range(4):
                    scores = corpus @ x[q, c]
                    order = [i for i in np.argsort(-scores).tolist() if i in own][:depth]
                    expected = plain(measure, order, grades, scores)
                    np.testing.assert_allclose(found[q, c], expected, rtol=1e-5)
    config = make_config(group_size=1000, group_sets=1)
    sets = group(config, corpus, x, judged)
    documents = corpus[[*np.delete(rows, [38, 3]), 40, 3]]  # Without rows 40 and 3, which are last.
    order = np.argsort(-(documents @ x[0, 1]), kind="stable").tolist()[:10]
    expected = plain("ndcg", order, {45: 2, 46: 1}, None)
    np.testing.assert_allclose(sets[0, 1], expected, rtol=1e-6)


RIGHT = [{40: 2, 3: 1, 8: 1}, {11: 1}]


@pytest.mark.parametrize("measure", SEARCH_MEASURES)
@pytest.mark.parametrize("depth", [10, 49])
def test_the_corpus_reward_is_the_measure_of_a_plain_ranking(vectors, judged, measure, depth):
    corpus, x = vectors[:49], fused(vectors)
    config = make_config(corpus_measure=measure, corpus_temperature=0.3, depth=depth)
    found = corpus_reward(config, build_index(corpus, "exact"), x, judged)
    assert found.shape == (2, 4)
    for q in range(2):
        for c in range(4):
            scores = corpus @ x[q, c]
            order = np.argsort(-scores)[:depth].tolist()
            expected = plain(measure, order, RIGHT[q], scores)
            # Scores are float32, here as there; ranks are exact.
            rtol = 1e-5 if measure == "softmax_share" else 1e-7
            np.testing.assert_allclose(found[q, c], expected, rtol=rtol)
    assert found[0, 0] == found[0].max()


@pytest.mark.parametrize("measure", SEARCH_MEASURES)
def test_the_corpus_reward_is_the_same_whatever_is_in_memory_at_once(
    vectors, judged, measure, monkeypatch
):
    config = make_config(corpus_measure=measure, corpus_temperature=0.3, depth=20)
    index, x = build_index(vectors[:49], "exact"), fused(vectors)
    whole = corpus_reward(config, index, x, judged)
    monkeypatch.setattr(
        "expandr_jax.rewards.search.BLOCK_ROWS", 5
    )  # One query, with four candidates.
    searched, real = [], index.search
    monkeypatch.setattr(index, "search", lambda q, k: searched.append(len(q)) or real(q, k))
    np.testing.assert_array_equal(corpus_reward(config, index, x, judged), whole)
    assert searched == [4, 4]


def test_the_group_reward_depends_on_seed_and_query_alone(vectors, judged):
    corpus, x = vectors[:49], fused(vectors)
    config = make_config(group_size=20, group_sets=3)
    found = group(config, corpus, x, judged)
    assert found.shape == (2, 4)
    assert ((found >= 0) & (found <= 1)).all()
    np.testing.assert_array_equal(group(config, corpus, x, judged), found)
    order = [2, 0, 3, 1]
    np.testing.assert_array_equal(group(config, corpus, x[:, order], judged), found[:, order])
    alone = dataclasses.replace(
        judged, **{f.name: getattr(judged, f.name)[1:] for f in dataclasses.fields(judged)}
    )
    np.testing.assert_array_equal(group(config, corpus, x[1:], alone), found[1:])
    config.seed = 1
    assert (group(config, corpus, x, judged) != found).any()


def test_a_group_of_the_whole_corpus_gives_its_ndcg(vectors, judged):
    corpus, x = vectors[:49], fused(vectors)
    found = group(make_config(group_size=1000, group_sets=2), corpus, x, judged)
    for q in range(2):
        for c in range(4):
            scores = corpus @ x[q, c]
            order = np.argsort(-scores)[:10].tolist()
            np.testing.assert_allclose(found[q, c], plain("ndcg", order, RIGHT[q], scores))
