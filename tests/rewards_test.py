"""Rank rewards against worked examples, a plain loop, and properties they must have."""

import numpy as np
import pytest

from expandr_jax import rewards


def test_ranks_of_a_worked_example():
    np.testing.assert_array_equal(rewards.ranks([[0.1, 0.9, 0.5, 0.9]]), [[4, 1, 3, 2]])


def test_ties_go_to_the_lower_index():
    np.testing.assert_array_equal(rewards.ranks(np.zeros(4)), [1, 2, 3, 4])


def test_ranks_equal_a_plain_count():
    scores = np.random.default_rng(0).integers(0, 6, (20, 32)).astype(np.float32)
    for row, ranked in zip(scores, rewards.ranks(scores), strict=True):
        for i, score in enumerate(row):
            above = sum(other > score for other in row) + sum(other == score for other in row[:i])
            assert ranked[i] == above + 1


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        rewards.ranks([0.0, np.nan])


def test_permuting_candidates_permutes_rewards():
    rng = np.random.default_rng(1)
    scores, order = rng.normal(size=(5, 32)), rng.permutation(32)
    np.testing.assert_array_equal(rewards.ranks(scores[:, order]), rewards.ranks(scores)[:, order])


def test_a_better_rank_never_scores_less():
    values = rewards.reciprocal_rank(np.array([1, 2, 3, 100, 0]))
    np.testing.assert_allclose(values, [1, 1 / 2, 1 / 3, 1 / 100, 0])


def test_rank_in_results():
    results = np.array([[5, 3, 1], [2, 4, 6], [7, 8, 9]])
    np.testing.assert_array_equal(rewards.rank_in_results(results, np.array([3, 2, 0])), [2, 1, 0])


def test_total_reward_weighs_its_terms():
    terms = {"positive": np.array([1.0, 0.5]), "answer": np.array([0.5, 1.0])}
    weights = rewards.RewardWeights(positive=1.0, answer=2.0)
    np.testing.assert_allclose(rewards.total_reward(terms, weights), [2.0, 2.5])


def test_the_filter_looks_at_the_best_sum():
    positive = np.array([[0.1, 0.5], [0.3, 0.3]])
    answer = np.array([[0.4, 0.1], [0.2, 0.29]])
    kept = rewards.passes_similarity_filter(positive, answer, 0.6)
    np.testing.assert_array_equal(kept, [True, False])


def test_pairs_take_the_extremes_and_the_lower_index():
    assert rewards.select_pair(np.array([0.5, 2.0, 2.0, 0.5]), list("abcd")) == (1, 0)
    assert rewards.select_pair(np.array([0.5, 2.0]), ["same", " same "]) is None
    assert rewards.select_pair(np.zeros(3), list("abc")) is None


def test_shares_of_a_worked_example():
    # Rewards log 1, log 2, log 3 at T = 1, and one candidate that may not be learned.
    found = rewards.candidate_shares(np.log([1, 2, 3, 100]), np.array([1, 1, 1, 0], bool), 1.0)
    np.testing.assert_allclose(found, [1 / 6, 2 / 6, 3 / 6, 0])
    # At half the temperature odds are squared: 1 to 4 to 9.
    found = rewards.candidate_shares(np.log([1, 2, 3]), np.ones(3, bool), 0.5)
    np.testing.assert_allclose(found, np.array([1, 4, 9]) / 14)


def test_shares_equal_a_plain_softmax_and_move_with_their_candidates():
    rng = np.random.default_rng(0)
    values, usable = rng.uniform(0, 2, (6, 8)), rng.random((6, 8)) < 0.7
    usable[:, 0] = True
    found = rewards.candidate_shares(values, usable, 0.5)
    for row, (value, use) in enumerate(zip(values, usable, strict=True)):
        exponentials = [np.exp(v / 0.5) if u else 0.0 for v, u in zip(value, use, strict=True)]
        np.testing.assert_allclose(found[row], np.array(exponentials) / sum(exponentials))
    order = rng.permutation(8)
    moved = rewards.candidate_shares(values[:, order], usable[:, order], 0.5)
    np.testing.assert_allclose(moved, found[:, order])


def test_near_zero_the_best_alone_is_learned_and_nothing_overflows():
    found = rewards.candidate_shares([[0.0, 2.0, 2.0, 1.0]], np.ones((1, 4), bool), 1e-3)
    np.testing.assert_array_equal(found, [[0, 0.5, 0.5, 0]])
    found = rewards.candidate_shares([[1e6, 0.0]], np.array([[False, True]]), 1e-3)
    np.testing.assert_array_equal(found, [[0, 1]])
    none = rewards.candidate_shares([[1.0, 2.0]], np.zeros((1, 2), bool), 1.0)
    np.testing.assert_array_equal(none, [[0, 0]])
