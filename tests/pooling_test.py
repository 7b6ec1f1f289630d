"""Pooling on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.models.pooling import l2_normalize, pool

HIDDEN = jnp.asarray(
    [[[1.0, 2.0], [3.0, 6.0], [50.0, 50.0]], [[50.0, 50.0], [2.0, 0.0], [4.0, 8.0]]]
)
MASK = jnp.asarray([[1, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mean", [[2.0, 4.0], [3.0, 4.0]]),
        ("cls", [[1.0, 2.0], [2.0, 0.0]]),
        ("last", [[3.0, 6.0], [4.0, 8.0]]),
    ],
)
def test_padding_on_either_side_is_left_out(kind, expected):
    pooled = pool(HIDDEN.astype(jnp.bfloat16), MASK, kind)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, expected)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        pool(HIDDEN, MASK, "max")


@pytest.mark.parametrize("kind", ["mean", "cls", "last"])
def test_a_text_without_tokens_is_zero(kind):
    found = pool(HIDDEN, MASK.at[1].set(0), kind)
    np.testing.assert_array_equal(found[0], pool(HIDDEN, MASK, kind)[0])
    np.testing.assert_array_equal(found[1], np.zeros(2))


def test_normalized_vectors_have_length_one_and_zero_stays_zero():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(l2_normalize(x), [[0.6, 0.8], [0.0, 0.0]], atol=1e-7)
    gradient = jax.grad(lambda x: l2_normalize(x).sum())(x)
    np.testing.assert_allclose(gradient, [[0.032, -0.024], [0.0, 0.0]], atol=1e-7)
