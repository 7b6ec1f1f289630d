"""Products of activations and weights: values and gradients against plain ones, and their form."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.models.product import product


def arrays(width_in, width_out, dtype=jnp.float32):
    generator = np.random.default_rng(0)
    shapes = (2, 5, width_in), (width_in, width_out), (2, 5, width_out)
    return [jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("widths", [(4, 12), (12, 4), (6, 6)])
def test_values_and_gradients_are_numpy_s(widths):
    x, kernel, weights = arrays(*widths)

    def loss(x, kernel):
        return jnp.sum(product(x, kernel) * weights)

    value, (x_grad, kernel_grad) = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)
    x, kernel, weights = (np.asarray(array, np.float64) for array in (x, kernel, weights))
    np.testing.assert_allclose(value, np.sum(x @ kernel * weights), rtol=1e-5)
    np.testing.assert_allclose(x_grad, weights @ kernel.T, atol=1e-5)
    expected = np.einsum("bti,bto->io", x, weights)
    np.testing.assert_allclose(kernel_grad, expected, atol=1e-5)


def test_gradients_have_the_type_of_their_arrays():
    x, kernel, weights = arrays(4, 12, jnp.bfloat16)
    grads = jax.grad(lambda *both: jnp.sum(product(*both) * weights), (0, 1))(x, kernel)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16] * 2


@pytest.mark.parametrize("widths", [(384, 1536), (1536, 384)])
def test_no_product_reads_its_left_side_by_columns(widths):
    """The slow form, which jnp.dot's own gradient takes."""

    def columns(function):
        shapes = (8, 128, widths[0]), widths
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        gradient = jax.jit(jax.grad(lambda *both: jnp.sum(jnp.square(function(*both))), (0, 1)))
        text = gradient.lower(*arguments).compile().as_text()
        return len(re.findall(r" dot\(.*lhs_contracting_dims=\{0\}", text))

    assert columns(jnp.dot) == 1
    assert columns(product) == 0
