"""Products of activations with weights, whose backward pass XLA computes quickly on CPU too.

The gradient of a weight sums over tokens: a product whose left side would be read by columns. XLA's
quick kernels for CPU take none of that form, and the one that does needs almost three times as
long, copies apart. Written out transposed, it is a product like any other.
"""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product [..., out] of activations [..., in] and a weight [in, out] of the same type."""
    return jnp.dot(x, kernel)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return jnp.dot(x, kernel), (x, kernel)


def _backward(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows, grads = (array.reshape(-1, array.shape[-1]) for array in (x, grad))
    kernel_grad = jax.lax.platform_dependent(rows, grads, cpu=_copied, default=_plain)
    return jnp.dot(grad, kernel.T), kernel_grad


def _plain(rows: jax.Array, grads: jax.Array) -> jax.Array:
    return jnp.dot(rows.T, grads)


def _copied(rows: jax.Array, grads: jax.Array) -> jax.Array:
    """`_plain` in a form that is quick on CPU; the barriers keep XLA from undoing it."""
    if rows.shape[1] <= grads.shape[1]:
        return jnp.dot(jax.lax.optimization_barrier(rows.T), grads)
    # The narrower side is written out: there is less of it, and what XLA computes while it writes,
    # an activation function for one, it computes slowly.
    other = jnp.dot(jax.lax.optimization_barrier(grads.T), rows)
    return jax.lax.optimization_barrier(other).T


product.defvjp(_forward, _backward)
