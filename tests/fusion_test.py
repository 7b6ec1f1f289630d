"""The expanded query on worked examples."""

import numpy as np

from expandr_jax.fusion import expanded_query

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
