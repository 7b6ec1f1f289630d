"""Vectors and rankings fused, on worked examples."""

import numpy as np
import pytest

from expandr_jax.ranking.stages import (
    average_feedback,
    exp4fuse,
    interpolate,
    reciprocal_rank_fusion,
    rocchio,
)
from expandr_jax.vectors.query import expanded_query

QUERY = np.array([[3.0, 4.0]])
PASSAGES = np.array([[[0.0, 2.0], [2.0, 0.0]]])
BOTH, FIRST, NONE = np.array([[1, 1]]) > 0, np.array([[1, 0]]) > 0, np.array([[0, 0]]) > 0


def fuse(present=BOTH, weight=0.5, normalize="none"):
    return np.asarray(
        expanded_query(QUERY, PASSAGES, present, query_weight=weight, normalize=normalize)
    )[0]


def test_raw_mean():
    np.testing.assert_allclose(fuse(), [2.0, 2.5])


def test_weight_is_the_querys():
    np.testing.assert_allclose(fuse(weight=0.8), [2.6, 3.4], rtol=1e-6)
    np.testing.assert_allclose(fuse(weight=1.0), [3.0, 4.0])


def test_normalize_before_the_mean():
    # Unit vectors (0.6, 0.8), (0, 1) and (1, 0): the passages' mean is (0.5, 0.5).
    np.testing.assert_allclose(fuse(normalize="before"), [0.55, 0.65], rtol=1e-6)


def test_normalize_after_the_mean():
    length = np.hypot(2.0, 2.5)
    np.testing.assert_allclose(fuse(normalize="after"), [2.0 / length, 2.5 / length], rtol=1e-6)


def test_normalize_both():
    length = np.hypot(0.55, 0.65)
    np.testing.assert_allclose(fuse(normalize="both"), [0.55 / length, 0.65 / length], rtol=1e-6)


def test_an_empty_generation_counts_for_nothing():
    np.testing.assert_allclose(fuse(FIRST), [1.5, 3.0])
    np.testing.assert_allclose(fuse(NONE), [3.0, 4.0])


def test_average_feedback_counts_the_query_as_one_of_them():
    np.testing.assert_allclose(average_feedback(QUERY, PASSAGES), [[5 / 3, 2.0]], rtol=1e-6)


def test_rocchio():
    # 0.9 (3, 4) + 0.1 (1, 1).
    found = rocchio(QUERY, PASSAGES, alpha=0.9, beta=0.1)
    np.testing.assert_allclose(found, [[2.8, 3.7]], rtol=1e-6)


def test_feedback_is_in_float32_whatever_comes_in():
    half = QUERY.astype(np.float16), PASSAGES.astype(np.float16)
    for found in (average_feedback(*half), rocchio(*half, alpha=0.9, beta=0.1)):
        assert found.dtype == np.float32


RANKINGS = (["a", "b", "c"], ["c", "d"])


def test_reciprocal_rank_fusion():
    fused = reciprocal_rank_fusion(RANKINGS)
    expected = {"a": 1 / 61, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 62}
    assert fused == pytest.approx(expected)
    assert reciprocal_rank_fusion(RANKINGS, k=0)["c"] == pytest.approx(1 / 3 + 1)
    assert reciprocal_rank_fusion([[], ["a"]]) == {"a": 1 / 61}


def test_exp4fuse_weighs_a_document_by_the_rankings_that_hold_it():
    expected = {"a": 1.1 / 61, "b": 1.1 / 62, "c": 1.2 * (1 / 63 + 1 / 61), "d": 1.1 / 62}
    assert exp4fuse(RANKINGS) == pytest.approx(expected)


def test_interpolation_scales_each_run():
    sparse, dense = {"a": 12.0, "b": 8.0, "c": 4.0}, {"b": 0.9, "d": 0.4}
    fused = interpolate([sparse, dense], [0.3, 0.7])
    assert fused == pytest.approx({"a": 0.3, "b": 0.3 * 0.5 + 0.7, "c": 0.0, "d": 0.0})
    assert interpolate([{"a": 2.0, "b": 2.0}, {}], [0.5, 0.5]) == {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="argument"):
        interpolate([sparse, dense], [1.0])
