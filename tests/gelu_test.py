"""GELU against PyTorch's exact one, in double precision: values, gradients, ends and NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from expandr_jax.models.gelu import gelu

POINTS = np.concatenate(
    [np.linspace(-14, 14, 40001), np.logspace(-8, 0, 500), -np.logspace(-8, 0, 500), [0.0]]
).astype(np.float32)


def reference(points):
    x = torch.tensor(points.astype(np.float64), requires_grad=True)
    y = torch.nn.functional.gelu(x)
    y.sum().backward()
    return y.detach().numpy(), x.grad.numpy()


def test_values_and_slopes_are_pytorch_s_to_rounding():
    values, slopes = reference(POINTS)
    np.testing.assert_allclose(jax.jit(gelu)(POINTS), values, atol=1e-6, rtol=1e-6)
    found = jax.jit(jax.grad(lambda x: gelu(x).sum()))(POINTS)
    np.testing.assert_allclose(found, slopes, atol=1e-6, rtol=1e-6)


def test_far_ends_are_right_and_nan_stays():
    x = jnp.array([-1e30, -40.0, 0.0, 40.0, 1e30, jnp.inf, jnp.nan])
    found = np.asarray(gelu(x))
    np.testing.assert_array_equal(found[[0, 1, 2, 5, 6]], [0.0, 0.0, 0.0, np.inf, np.nan])
    np.testing.assert_allclose(found[3:5], x[3:5], rtol=2e-7)


def test_bfloat16_is_float32_s_value_rounded():
    x = jnp.asarray(POINTS[::50], jnp.bfloat16)
    found = gelu(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, gelu(x.astype(jnp.float32)).astype(jnp.bfloat16))
    assert jax.grad(lambda x: gelu(x).sum())(x).dtype == jnp.bfloat16
