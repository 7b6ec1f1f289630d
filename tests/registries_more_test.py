"""The registries that tests/registries_test.py leaves out; and that no registry is left out."""

import dataclasses
import functools
import math
import pathlib
import re

import numpy as np
import pytest

from configs import base
from expandr_jax.config import read_config, with_settings
from expandr_jax.expansion.combine import COMBINES, Found
from expandr_jax.losses.policy import (
    ADVANTAGES,
    POLICY_LOSSES,
    PolicySettings,
    policy_losses,
    token_weights,
)
from expandr_jax.losses.reranking import RERANKING_LOSSES
from expandr_jax.objectives.registry import OBJECTIVES, STEP_B, StepB
from expandr_jax.objectives.reward_sft import REWARD_SFT
from expandr_jax.rewards.search import SEARCH_MEASURES, Searched
from expandr_jax.rewards.searches import REWARD_SEARCHES
from tests.registries_test import TEXTS, VECTORS, evidence, jitted_too
from train.generator import read_rows

HERE = pathlib.Path(__file__).parent
# Registries of names, texts and programs have nothing to be worked out; NAME stands for a name.
NOT_OF_NUMBERS = {"PROMPTS", "MODES", "ABSENT", "NAME"}
ELSEWHERE = {"WEIGHED_FUSIONS"}  # Fusions once more, with weights: tests/fusion_test.py.


def test_no_registry_is_left_out():
    """Those that docs/architecture.md names, and those that are declared to be of functions."""
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", (HERE.parent / "docs/architecture.md").read_text()))
    declared = {
        name
        for path in (HERE.parent / "expandr_jax").rglob("*.py")
        for name in re.findall(r"(?m)^([A-Z][A-Z_]+): dict\[str, Callable", path.read_text())
    }
    tests = "".join(path.read_text() for path in HERE.glob("registries*_test.py"))
    run = set(re.findall(r'parametrize\("\w+", ([A-Z_]+)\)', tests))
    assert named > {"STRATEGIES", *NOT_OF_NUMBERS, *ELSEWHERE}
    assert not (named | declared) - NOT_OF_NUMBERS - ELSEWHERE - run


@pytest.mark.parametrize("name", STEP_B)
def test_kinds_of_step_b(name):
    """Each has sections that there are, and learns either of files or by a trainer."""
    config, kind = with_settings(read_config(base.get_config()), {"step_b": name}), STEP_B[name]
    assert config.learned is getattr(config, kind.section)
    assert config.rewarded is getattr(config, kind.rewarded)
    assert min(config.learned.batch_size, config.rewarded.max_new_tokens) > 0
    assert (not kind.objectives) == (kind.trainer is not None) == kind.on_policy
    assert kind.on_policy or kind.objectives[config.objective.name] is config.objective
    assert kind.objectives.items() <= OBJECTIVES.items()


def test_a_kind_s_file_is_read_by_its_own_section(monkeypatch):
    """Not by `dpo`, whatever else is."""
    given = []
    mine = dataclasses.replace(
        REWARD_SFT, name="mine", read=lambda *args, **_: given.append(args) or ([], {})
    )
    monkeypatch.setitem(STEP_B, "mine", StepB("MINE", "grpo", "candidates", {"mine": mine}))
    config = with_settings(read_config(base.get_config()), {"step_b": "mine"})
    assert config.objective is mine
    read_rows(mine, config, pathlib.Path("candidates.jsonl"), None, own=True)
    ((_, _, settings, *_),) = given
    assert settings is config.grpo


RANKED = {  # Of a relevant document's score 2 beside a 1; a third document is not there.
    "binary": (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2,
    "listwise": math.log(1 + math.exp(-1)),
}


@pytest.mark.parametrize("name", RERANKING_LOSSES)
def test_reranking_losses(name):
    scores = np.array([[2.0, 1.0, 50.0], [0.0, -1.0, 3.0]], np.float32)
    given = np.array([[True, True, False], [True, True, True]])
    found = jitted_too(RERANKING_LOSSES[name], scores, given)
    assert found.shape == (2,)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], RANKED[name], rtol=1e-5)
    order = [0, 2, 1]  # The negatives change places.
    moved = RERANKING_LOSSES[name](scores[::-1, order], given[::-1, order])
    np.testing.assert_allclose(moved, found[::-1], rtol=1e-6)


# A text of two tokens, worth 2, and one of one token, worth -1. The ratios of the former are 1.1
# and 1.21, their product 1.331; that of the latter is 1. Log-probabilities are -1, -2 and -3.
ON_POLICY = {
    "grpo": -(2.2 + 2.4) / 4 + 1 / 2,
    "dr_grpo": -(2.2 + 2.4) / 8 + 1 / 8,  # A text may have four tokens.
    "dapo": -(2.2 + 2.42) / 3 + 1 / 3,
    "gspo": -2 * 1.0004 / 2 + 1 / 2,
    "rloo": -2 * 1.2 / 2 + 1 / 2,
    "cispo": (2.2 * 1 + 2.42 * 2 - 3) / 3,
}


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_losses(name):
    loss, lengths, learned = POLICY_LOSSES[name], [[2, 1]] * 2, np.ones((2, 2), bool)

    def per_token(reduction):
        of_texts = token_weights(lengths, learned, reduction, 4).astype(np.float32)
        return np.append(np.repeat(of_texts, [2, 1], axis=1), np.zeros((2, 1), np.float32), axis=1)

    log_probs = np.array([[-1, -2, -3, np.nan], [-3, -1, -2, np.nan]], np.float32)
    old = log_probs - np.log([[1.1, 1.21, 1, 1], [1, 0.5, 3, 1]]).astype(np.float32)
    batch = {
        "responses": np.array([[1, 1, 2, 0]] * 2),
        "advantages": np.array([[2, 2, -1, 0], [-1, -1, 1, 0]], np.float32),
        "weights": per_token(loss.reduction),
        "means": per_token("batch"),
        "old": old,
        "sampled": old,
    }
    of = functools.partial(policy_losses, loss=loss, settings=PolicySettings(), count=2)
    found, metrics = jitted_too(of, log_probs, np.ones_like(log_probs), batch)
    for column in (found, *metrics.values()):
        assert column.shape == (2,)
        assert np.isfinite(column).all()
    np.testing.assert_allclose(found[0], ON_POLICY[name], rtol=1e-5)
    turned, _ = of(
        log_probs[::-1],
        np.ones_like(log_probs),
        {field: array[::-1] for field, array in batch.items()},
    )
    np.testing.assert_allclose(turned, found[::-1], rtol=1e-6)


GAINED = {  # Of rewards 1 and 3, whose deviation is the root of 2.
    "deviation": 1 / (math.sqrt(2) + 1e-4),
    "mean": 1,
    "leave_one_out": 2,
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages(name):
    rewards = np.array([[1.0, 3.0], [0.5, -2.0]])
    found = ADVANTAGES[name](rewards)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], [-GAINED[name], GAINED[name]])
    np.testing.assert_allclose(ADVANTAGES[name](rewards[::-1, ::-1]), found[::-1, ::-1])


COMBINED = {  # Of two documents: the query and two texts weigh 0.6, 0.2 and 0.2.
    "max": [0.6 * 0.5 + 0.4 * 0.9, 0.6 * 0.1 + 0.4 * 0.8],
    "mean-score": [0.8, 0.2],  # The second text alone has the second document first.
    "rrf": [0.8 / 61, 0.2 / 61],
}


@pytest.mark.parametrize("name", COMBINES)
def test_combines(name):
    scores = np.array([[0.5, 0.1], [0.9, 0.2], [0.1, 0.8]])
    ranks, weights = np.array([[1, 0], [1, 0], [0, 1]]), np.array([0.6, 0.2, 0.2])
    for texts in ([0, 1, 2], [0, 2, 1]):
        for documents in ([0, 1], [1, 0]):
            part = np.ix_(texts, documents)
            found = COMBINES[name](Found(np.arange(2), scores[part], ranks[part]), weights)
            np.testing.assert_allclose(found, np.array(COMBINED[name])[documents])


MEASURED = {  # The relevant documents, of grades 2 and 1, are third and second of three.
    "reciprocal_rank": 1 / 3,
    "ndcg": (2 / 2 + 1 / math.log2(3)) / (2 + 1 / math.log2(3)),
    "average_precision": (1 / 2 + 2 / 3) / 2,
    "softmax_share": (math.exp(1) + 1) / (math.exp(2) + math.exp(1) + 1),
    "piecewise_rank": 2 - 1 / 9,
    "hit": 1,
}


@pytest.mark.parametrize("name", SEARCH_MEASURES)
def test_search_measures(name):
    found = np.array([[4, 7, 2], [9, 8, -1]])
    arrays = (
        np.array([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0]]), found, np.array([[2, 7], [3, -1]]),
        np.array([[2.0, 1.0], [1.0, 0.0]]),
    )  # fmt: skip

    def of(order):
        held = found[order] == 7  # The document that holds an answer.
        moved = (array[order] for array in arrays)
        return SEARCH_MEASURES[name].of(Searched(*moved, temperature=1.0, held=lambda: held))

    worth = of([0, 1])
    np.testing.assert_allclose(worth, [MEASURED[name], 0])  # The second search found nothing.
    np.testing.assert_allclose(of([1, 0]), worth[::-1])


# Rows found for "axis" alone, with "loss", and with nothing; and the first one's first score. By
# BM25 the query's word counts five times; d0 has it twice, and is as long as 1.2 mean documents.
SEARCHED = {
    "dense": ([[0, 1, 2], [2, 1, 0], [0, 1, 2]], 1.0),
    "bm25": ([[0, -1, -1], [0, 2, -1], [0, -1, -1]], math.log(1 + 2.5 / 1.5) * 2 / (2 + 0.972)),
    "fused": ([[0, 1, 2], [2, 0, 1], [0, 1, 2]], 2 / 61),
}


@pytest.mark.parametrize("name", REWARD_SEARCHES)
def test_reward_searches(name):
    def of(texts):
        vectors = [VECTORS[TEXTS.index(text)] for text in texts]
        return REWARD_SEARCHES[name].of(evidence(texts, vectors), True)(slice(0, 1))

    rows, first = SEARCHED[name]
    scores, found = of(["loss", ""])
    np.testing.assert_array_equal(found, rows)
    assert scores.shape == found.shape
    assert np.isfinite(scores[found >= 0]).all()
    np.testing.assert_allclose(scores[0, 0], first, rtol=1e-6)
    turned = of(["", "loss"])
    np.testing.assert_array_equal(turned[1], found[[0, 2, 1]])
    np.testing.assert_allclose(turned[0], scores[[0, 2, 1]], rtol=1e-6)
    alone = REWARD_SEARCHES[name].of(evidence(["loss"], [VECTORS[0]]), False)(slice(0, 1))
    np.testing.assert_array_equal(alone[1], found[1:2])
