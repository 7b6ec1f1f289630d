"""Rank rewards against worked examples, a plain loop, and properties they must have."""

import numpy as np
import pytest

from expandr_jax import metrics
from expandr_jax.rewards import ranks as rewards
from expandr_jax.rewards.form import soft_overlong
from expandr_jax.rewards.registry import total_reward
from expandr_jax.rewards.selection import (
    candidate_shares,
    passes_similarity_filter,
    select_pair,
)


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


def test_piecewise_ranks_of_worked_examples():
    found = rewards.piecewise_rank(np.array([1, 2, 5, 10, 11, 55, 99, 100, 101, 1000, 0]))
    expected = [2, 17 / 9, 14 / 9, 1, 89 / 90, 1 / 2, 1 / 90, 0, 0, 0, 0]
    np.testing.assert_allclose(found, expected)
    np.testing.assert_array_equal(rewards.best_rank(np.array([[0, 7, 3], [0, 0, 0]])), [3, 0])


def test_what_a_long_text_loses_in_a_worked_example():
    lengths = np.array([1, 12, 13, 14, 15, 16, 16, 3])
    cut = np.array([0, 0, 0, 0, 0, 0, 1, 1], bool)
    found = soft_overlong(lengths, cut, most=16, cache=4)
    np.testing.assert_array_equal(found, [0, 0, -0.25, -0.5, -0.75, -1, -1, -1])


def test_the_rank_of_one_document_in_results():
    results = np.array([[5, 3, 1], [2, 4, 6], [7, 8, 9]])
    np.testing.assert_array_equal(
        rewards.ranks_in_results(results, np.array([[3], [2], [0]])), [[2], [1], [0]]
    )


def test_ranks_of_several_documents():
    results = np.array([[5, 3, 1], [2, 4, 6]])
    documents = np.array([[1, 9, -1], [2, 6, 4]])
    found = rewards.ranks_in_results(results, documents)
    np.testing.assert_array_equal(found, [[3, 0, 0], [1, 3, 2]])
    found = rewards.ranks_in_results(np.array([[5, -1, -1]]), np.array([[1, 5, -1]]))
    np.testing.assert_array_equal(found, [[0, 1, 0]])  # What fills both up is no document.


def test_softmax_share_of_a_worked_example():
    scores = np.log([[6.0, 3.0, 1.0], [6.0, 3.0, 1.0], [4.0, 1.0, 0.5]]) / 2
    results = np.array([[5, 3, 1], [5, 3, 1], [5, 3, -1]])
    documents = np.array([[3, -1, -1], [1, 5, 9], [3, -1, -1]])
    found = rewards.softmax_share(scores, results, documents, 0.5)
    np.testing.assert_allclose(found, [3 / 10, 7 / 10, 1 / 5])
    assert rewards.softmax_share(scores[:1], results[:1], np.array([[9]]), 0.5) == 0
    assert rewards.softmax_share(np.full((1, 2), -np.inf), np.full((1, 2), -1), [[3]], 0.5) == 0
    far = rewards.softmax_share(np.array([[9.0, -9.0]]), np.array([[1, 2]]), [[1]], 1e-3)
    np.testing.assert_array_equal(far, [1.0])
    damaged = rewards.softmax_share(np.array([[np.nan, 1.0]]), np.array([[1, 2]]), [[1]], 0.5)
    assert np.isnan(damaged)


def test_ndcg_and_average_precision_of_a_worked_example():
    # Grade 2 at rank 3, grade 1 at rank 1, one of grade 1 not found, one place filled up.
    rank, grades = np.array([3, 1, 0, 0]), np.array([2, 1, 1, 0])
    ideal = 2 + 1 / np.log2(3) + 1 / 2
    np.testing.assert_allclose(rewards.ndcg(rank, grades), (2 / 2 + 1) / ideal)
    np.testing.assert_allclose(rewards.ndcg(rank, grades, cutoff=2), 1 / (2 + 1 / np.log2(3)))
    np.testing.assert_allclose(rewards.average_precision(rank, grades > 0), (1 / 1 + 2 / 3) / 3)
    assert rewards.ndcg(np.zeros(2), np.zeros(2)) == 0
    assert rewards.average_precision(np.zeros(2), np.zeros(2, bool)) == 0


def test_they_equal_ir_measures_of_the_same_rankings():
    rng = np.random.default_rng(2)
    results = np.stack([rng.permutation(40)[:20] for _ in range(30)])
    documents = np.stack([rng.permutation(40)[:6] for _ in range(30)])
    grades = rng.integers(0, 4, (30, 6))
    run = {
        f"q{q}": {f"d{d}": -float(i) for i, d in enumerate(row)} for q, row in enumerate(results)
    }
    qrels = {
        f"q{q}": {f"d{d}": int(g) for d, g in zip(*row, strict=True)}
        for q, row in enumerate(zip(documents, grades, strict=True))
    }
    expected = metrics.evaluate(run, qrels, ("ndcg", "ndcg@10", "map"))
    rank = rewards.ranks_in_results(results, documents)
    for name, values in (
        ("ndcg", rewards.ndcg(rank, grades)),
        ("ndcg@10", rewards.ndcg(rank, grades, cutoff=10)),
        ("map", rewards.average_precision(rank, grades > 0)),
    ):
        np.testing.assert_allclose(values, list(expected[name].values()), atol=1e-9)


@pytest.mark.parametrize("measure", ["ndcg", "ndcg, cut", "average precision"])
def test_a_document_ranked_better_never_scores_less(measure):
    """Each relevant document in turn changes places with one above it that is not relevant."""
    functions = {
        "ndcg": rewards.ndcg,
        "ndcg, cut": lambda rank, grades: rewards.ndcg(rank, grades, cutoff=7),
        "average precision": lambda rank, grades: rewards.average_precision(rank, grades > 0),
    }
    rng = np.random.default_rng(3)
    for _ in range(300):
        grades = rng.integers(1, 4, 4)
        rank = rng.permutation(np.arange(1, 13))[:4]
        rank[rng.random(4) < 0.2] = 0
        better, moved = rank.copy(), rng.integers(4)
        free = [r for r in range(1, 13) if r not in rank and (r < rank[moved] or not rank[moved])]
        if not free:
            continue
        better[moved] = rng.choice(free)
        value, improved = functions[measure](rank, grades), functions[measure](better, grades)
        assert 0 <= value <= improved <= 1


def test_group_ndcg_equals_a_plain_loop_and_moves_with_its_candidates():
    rng = np.random.default_rng(4)
    queries, documents = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 3, 20, 8))
    grades = rng.integers(0, 3, (2, 3, 20)) * (rng.random((2, 3, 20)) < 0.2)
    found = rewards.group_ndcg(queries, documents, grades)
    for q in range(2):
        for c in range(5):
            values = []
            for s in range(3):
                order = np.argsort(-(documents[q, s] @ queries[q, c]))[:10]
                gains = [grades[q, s, d] / np.log2(i + 2) for i, d in enumerate(order)]
                best = np.sort(grades[q, s])[::-1][:10]
                ideal = sum(g / np.log2(i + 2) for i, g in enumerate(best))
                values.append(sum(gains) / ideal if ideal else 0.0)
            np.testing.assert_allclose(found[q, c], np.mean(values))
    order = rng.permutation(5)
    moved = rewards.group_ndcg(queries[:, order], documents, grades)
    np.testing.assert_allclose(moved, found[:, order])


def test_total_reward_weighs_its_terms():
    terms = {"positive": np.array([1.0, 0.5]), "answer": np.array([0.5, 1.0])}
    weights = {"positive": 1.0, "answer": 2.0, "gain": 3.0}
    np.testing.assert_allclose(total_reward(terms, weights), [2.0, 2.5])


def test_the_filter_looks_at_the_best_sum():
    positive = np.array([[0.1, 0.5], [0.3, 0.3]])
    answer = np.array([[0.4, 0.1], [0.2, 0.29]])
    kept = passes_similarity_filter(positive, answer, 0.6)
    np.testing.assert_array_equal(kept, [True, False])


def test_pairs_take_the_extremes_and_the_lower_index():
    assert select_pair(np.array([0.5, 2.0, 2.0, 0.5]), list("abcd")) == (1, 0)
    assert select_pair(np.array([0.5, 2.0]), ["same", " same "]) is None
    assert select_pair(np.zeros(3), list("abc")) is None


def test_shares_of_a_worked_example():
    # Rewards log 1, log 2, log 3 at T = 1, and one candidate that may not be learned.
    found = candidate_shares(np.log([1, 2, 3, 100]), np.array([1, 1, 1, 0], bool), 1.0)
    np.testing.assert_allclose(found, [1 / 6, 2 / 6, 3 / 6, 0])
    # At half the temperature odds are squared: 1 to 4 to 9.
    found = candidate_shares(np.log([1, 2, 3]), np.ones(3, bool), 0.5)
    np.testing.assert_allclose(found, np.array([1, 4, 9]) / 14)


def test_shares_equal_a_plain_softmax_and_move_with_their_candidates():
    rng = np.random.default_rng(0)
    values, usable = rng.uniform(0, 2, (6, 8)), rng.random((6, 8)) < 0.7
    usable[:, 0] = True
    found = candidate_shares(values, usable, 0.5)
    for row, (value, use) in enumerate(zip(values, usable, strict=True)):
        exponentials = [np.exp(v / 0.5) if u else 0.0 for v, u in zip(value, use, strict=True)]
        np.testing.assert_allclose(found[row], np.array(exponentials) / sum(exponentials))
    order = rng.permutation(8)
    moved = candidate_shares(values[:, order], usable[:, order], 0.5)
    np.testing.assert_allclose(moved, found[:, order])


def test_near_zero_the_best_alone_is_learned_and_nothing_overflows():
    found = candidate_shares([[0.0, 2.0, 2.0, 1.0]], np.ones((1, 4), bool), 1e-3)
    np.testing.assert_array_equal(found, [[0, 0.5, 0.5, 0]])
    found = candidate_shares([[1e6, 0.0]], np.array([[False, True]]), 1e-3)
    np.testing.assert_array_equal(found, [[0, 1]])
    none = candidate_shares([[1.0, 2.0]], np.zeros((1, 2), bool), 1.0)
    np.testing.assert_array_equal(none, [[0, 0]])
