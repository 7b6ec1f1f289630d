"""Co-augmentation: documents of a step, versions that are drawn, and what each text is worth."""

import dataclasses
import itertools
import math
import types

import numpy as np
import pytest

from configs import coaug
from expandr_jax.config import read_config, with_settings
from expandr_jax.data.beir import Collection
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.files.records import read_jsonl
from expandr_jax.objectives.coaugmentation import (
    check_documents,
    document_group,
    documents_beside,
    score_together,
)
from expandr_jax.objectives.policy import Sampled, pack_sampled
from expandr_jax.rewards.coaugmentation import (
    coaugmentation_rewards,
    draw_documents,
    drawn_versions,
)
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.runtime.processes import Processes
from expandr_jax.search import Bm25Index
from tests.commands import finish, start, step_metrics, until
from train.scores import RewardTools, reward_context

IDS = [f"d{i}" for i in range(30)]
QRELS = {
    "a": {"d0": 2, "d1": 1, "d2": 1, "d3": 0, "d4": 0},
    "b": {"d1": 1, "d9": 1},
    "c": {"d0": 1},
}


def data():
    corpus = {document: f"text of {document}" for document in IDS}
    queries = {query: f"query {query}" for query in QRELS}
    return TrainingData(Collection("c", corpus, queries, {"train": QRELS}), [], [*QRELS])


@pytest.mark.parametrize("each", [1, 4, 8])
def test_a_step_has_relevant_irrelevant_and_other_documents(each):
    for step in range(20):
        drawn = draw_documents(data(), ["a", "b", "c"], each, 0, step)
        assert len(drawn) == len({*drawn}) == 3 * each
        assert {*drawn} <= {*IDS}
        relevant = {"d0", "d1", "d2"} & {*drawn[:each]}
        assert len(relevant) == (3 if each == 8 else -(-each // 2)) or each == 8
        assert len(relevant) >= min(3, -(-each // 2))
        if each >= 4:
            assert {"d3", "d4"} & {*drawn[:each]}
        assert drawn == draw_documents(data(), ["a", "b", "c"], each, 0, step)
    steps = {tuple(draw_documents(data(), ["a", "b"], each, 0, step)) for step in range(20)}
    assert len(steps) > 1


def test_each_version_is_drawn_as_often_as_the_others():
    draws = drawn_versions(5, 3, 8, 0, 4)
    assert draws.shape == (9, 5)
    for column in draws.T:
        np.testing.assert_array_equal(np.bincount(column), [3, 3, 3])
    assert len({*map(tuple, draws.T)}) > 1  # Documents do not go together.
    np.testing.assert_array_equal(draws, drawn_versions(5, 3, 8, 0, 4))
    assert (draws != drawn_versions(5, 3, 8, 0, 5)).any()


def ndcg_at_ten(scores, grades):
    order = sorted(range(len(scores)), key=lambda d: (-scores[d], grades[d]))
    gains = [grades[d] / math.log2(place + 2) for place, d in enumerate(order[:10])]
    best = sorted(grades, reverse=True)[:10]
    return sum(gains) / sum(g / math.log2(place + 2) for place, g in enumerate(best))


def test_rewards_are_the_means_over_draws_of_a_twin_in_loops():
    rng = np.random.default_rng(0)
    queries, texts, documents, versions = 3, 4, 12, 2
    scores = rng.normal(size=(queries, texts, documents, versions))
    grades = rng.integers(0, 3, (queries, documents)) * (rng.random((queries, documents)) < 0.3)
    grades[:, 0] = 1
    draws = drawn_versions(documents, versions, 6, 0, 0)
    of_queries, of_documents = coaugmentation_rewards(scores, grades, draws)
    worth = np.zeros((len(draws), queries, texts))
    for r, q, t in itertools.product(range(len(draws)), range(queries), range(texts)):
        seen = [scores[q, t, d, draws[r, d]] for d in range(documents)]
        worth[r, q, t] = ndcg_at_ten(seen, [*grades[q]])
    np.testing.assert_allclose(of_queries, worth.mean(axis=0), atol=1e-12)
    for d, v in itertools.product(range(documents), range(versions)):
        total = weights = 0.0
        for r, q, t in itertools.product(range(len(draws)), range(queries), range(texts)):
            if draws[r, d] == v:
                weight = 1 + 10 * grades[q, d]
                total, weights = total + weight * worth[r, q, t], weights + weight
        np.testing.assert_allclose(of_documents[d, v], total / weights, atol=1e-12)


def test_the_version_that_makes_a_document_found_is_worth_more_and_ties_gain_nothing():
    # One query, a relevant document whose second version alone outscores eleven others.
    scores = np.ones((1, 2, 12, 2))
    scores[0, :, 0, 1] = 2.0
    grades = np.array([[1] + [0] * 11])
    of_queries, of_documents = coaugmentation_rewards(
        scores, grades, drawn_versions(12, 2, 4, 0, 0)
    )
    np.testing.assert_array_equal(of_queries, [[0.5, 0.5]])  # Tied it stands last, and below ten.
    np.testing.assert_array_equal(of_documents[0], [0, 1])


def test_words_of_other_texts_weigh_as_in_the_corpus():
    corpus = ["stars shine at night", "the tides follow the moon", "stars and moon and night"]
    index = Bm25Index(corpus)
    queries = ["stars at night night", "moon unheard"]
    found = index.score_texts(queries, corpus)
    scores, rows = index.search(queries, 3)
    for own, score, order in zip(found, scores, rows, strict=True):
        np.testing.assert_allclose(own[order], score, rtol=1e-5)
    n, mean = 3, (3 + 3 + 3) / 3  # "at", "the" and "and" are no words.
    weight = math.log(1 + (n - 2 + 0.5) / (2 + 0.5))
    expected = weight * 2 / (2 + 0.9 * (1 - 0.4 + 0.4 * 4 / mean))
    found = index.score_texts(["stars"], ["stars unheard stars unheard", "", "unheard"])
    np.testing.assert_allclose(found, [[expected, 0, 0]], rtol=1e-6)


class Encoder:
    """Every text has a vector of its own, of unit length."""

    separator, normalize = "[SEP]", "both"

    def encode(self, texts, kind, *_):
        rows = [np.random.default_rng([*f"{kind} {t}".encode()]).normal(size=8) for t in texts]
        return np.stack([row / np.linalg.norm(row) for row in rows]).astype(np.float32)


@pytest.mark.parametrize("search", ["dense", "bm25"])
def test_a_step_s_texts_are_rewarded_by_their_searches(search):
    """As `dense@d2e+q2e` and `bm25@d2e+q2e` search: E(q text), over documents with their texts."""
    config = with_settings(
        read_config(coaug.get_config()), {"reward.search": search, "grpo.documents": 2}
    )
    texts_of_documents = data().collection.corpus.values()
    tools = RewardTools(lambda: Bm25Index(texts_of_documents))
    context = reward_context(config, tools, data(), None, ["a", "b"], 2, 0)
    score = score_together(context, Encoder(), config.grpo.document_weights, Processes())
    sampler = types.SimpleNamespace(fits=lambda _: True, seed=config.seed)
    beside = documents_beside(data(), config.grpo, sampler, config.answer.max_characters)
    drawn = beside.draw(["a", "b"], 3)
    assert len({group.query_id for group in drawn}) == len(drawn) == 4
    assert all(group.query_id == f"document/{group.positive_id}" for group in drawn)
    assert f"Document: text of {drawn[0].positive_id}\n" in beside.message(drawn[0])
    assert beside.first == document_group(data(), "d0")

    def texts(name):
        return [Candidate(f"text {i} written for {name}"[5 * i :]) for i in range(3)]

    of_queries = [Group(q, f"query {q}", "d1", "", texts(q)) for q in ("a", "b")]
    of_documents = [dataclasses.replace(g, candidates=texts(g.query_id)) for g in drawn]
    groups, seconds = score([*of_queries, *of_documents])
    assert {*seconds} == {"encoding_seconds", "search_seconds"}

    def asked(group):
        return [f"{group.query} {text}" for text in group.texts]

    read = [asked(group) for group in of_documents]
    if search == "dense":
        found = [Encoder().encode(row, "document") for row in read]
        scores = np.array(
            [[[v @ d.T for d in found] for v in Encoder().encode(asked(g), "query")]
             for g in of_queries]
        )  # fmt: skip
    else:
        index = Bm25Index([f"text of {document}" for document in IDS])
        scores = np.array(
            [[[index.score_texts([text], row)[0] for row in read] for text in asked(g)]
             for g in of_queries]
        )  # fmt: skip
    grades = np.array([[QRELS[q].get(g.positive_id, 0) for g in of_documents] for q in ("a", "b")])
    # Of all draws, each equally likely, the mean: what many draws come near.
    draws = np.array([*itertools.product(range(3), repeat=4)])
    expected = np.concatenate(coaugmentation_rewards(scores, grades, draws))
    totals = np.array([[c.total for c in group.candidates] for group in groups])
    assert np.abs(totals - expected).max() < 0.1
    weights = [1.0, 1.0, *np.where(grades.any(axis=0), 0.2, 0.1)]
    assert [group.weight for group in groups] == weights
    assert {*groups[0].candidates[0].rewards} == {"query"}
    assert {*groups[2].candidates[0].rewards} == {"document"}


def test_a_group_s_weight_is_its_advantages():
    settings = read_config(coaug.get_config()).grpo
    candidates = [Candidate(str(i), tokens=[1, 2], log_probs=[0.0, 0.0], total=i) for i in range(2)]
    rows = [
        Sampled(Group(name, "", "", "", candidates, weight=weight), [5, 6])
        for name, weight in (("q", 1.0), ("document/d", 0.2))
    ]
    batch = pack_sampled(rows, settings, 0, [(16, 16)])
    np.testing.assert_allclose(batch["advantages"][0, :4], [-0.5, -0.5, 0.5, 0.5])
    np.testing.assert_allclose(batch["advantages"][1], 0.2 * batch["advantages"][0], rtol=1e-6)


def test_a_record_says_whether_it_is_of_a_document_and_older_ones_are_of_queries():
    group = document_group(data(), "d1")
    row = group.to_row()
    assert row["is_document"]
    assert Group.from_row(row) == group
    # Whatever the id of a query is like, its line is as earlier versions wrote it.
    query = Group("document/1", "axis", "d1", "", [])
    assert "is_document" not in query.to_row()
    assert Group.from_row(query.to_row()) == query


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward.group": 0.0}, r"reward\.group"),
        ({"reward.gain": 1.0}, r"^reward\.gain is 1\.0; expected 0, as grpo\.documents"),
        ({"reward.search": "fused"}, r"^reward\.search is 'fused'; expected 'dense' or 'bm25'"),
        ({"grpo.resample": 2}, r"^grpo\.resample is 2; expected 0"),
        ({"grpo.document_weights": (1.0, 1.0, 1.0)}, r"^grpo\.document_weights is .*two numbers"),
    ],
)
def test_what_does_not_go_with_documents_is_refused(changed, message):
    config = coaug.get_config()
    config.update_from_flattened_dict(changed)
    with pytest.raises(UserError, match=message):
        read_config(config)


def test_more_documents_than_there_are_and_names_like_theirs_are_refused():
    settings = read_config(coaug.get_config()).grpo
    with pytest.raises(UserError, match=r"mine\.documents 4, with 8 queries a step: there are 30"):
        check_documents(dataclasses.replace(settings, queries=8), "mine", data())
    odd = dataclasses.replace(data(), generator_train=["document/7"])
    with pytest.raises(UserError, match="the id of query 'document/7' begins"):
        check_documents(settings, "grpo", odd)


@pytest.mark.slow
def test_documents_texts_are_learned_with_those_of_queries(tmp_path):
    settings = {
        "step_b": "grpo", "expansion.strategy": "q2e", "reward.positive": 0.0,
        "reward.answer": 0.0, "reward.corpus": 0.0, "reward.group": 1.0, "reward.group_sets": 8,
        "grpo.queries": 4, "grpo.documents": 3, "grpo.samples": 4, "grpo.steps": 4,
        "grpo.max_new_tokens": 8, "grpo.learning_rate": 1e-2, "grpo.save_every": 2,
        "retriever.max_length": 64,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    finish(start(tmp_path / "run", *overrides, module="train.policy"))
    steps = step_metrics(tmp_path / "run")
    assert [row["step"] for row in steps] == [*range(4)]
    for row in steps:
        assert 0 <= row["reward_query"] <= 1
        assert 0 <= row["reward_document"] <= 1
        # A quarter of the groups are queries.
        mean = (row["reward_query"] + 3 * row["reward_document"]) / 4
        assert row["reward"] == pytest.approx(mean)
        assert row["largest_mismatch"] < 1e-4
    assert steps[-1]["kl"] > 1e-5
    rows = [row for _, row in read_jsonl(tmp_path / "run/round-0/policy-texts-4.jsonl", {})]
    documents = [row for row in rows if row.get("is_document")]
    assert len(documents) == 3 * (len(rows) - len(documents))
    again = start(tmp_path / "again", *overrides, module="train.policy")
    log = tmp_path / "again" / "metrics.jsonl"
    until([again], lambda: log.exists() and log.read_text().count("\n") >= 3)
    again.kill()
    again.wait()
    finish(start(tmp_path / "again", *overrides, module="train.policy"))
    assert step_metrics(tmp_path / "again") == steps
    adapter = "export/adapter/adapter_model.safetensors"
    assert (tmp_path / "again" / adapter).read_bytes() == (tmp_path / "run" / adapter).read_bytes()
