"""Takes the time of the programs of a plan, on devices that are here, with made-up numbers."""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from expandr_jax.planning.planned import Planned

PARAMETER_SCALE = 0.02  # Made-up parameters have it, as those that models are begun with.


def time_program(planned: Planned, compiled: jax.stages.Compiled, repeats: int) -> float | None:
    """Median of the seconds that the planned work takes in `repeats` calls, after one to warm up.

    The program is compiled for devices of this process. None: their memory does not suffice after
    all.
    """
    seconds = []
    try:
        arguments = tuple(jax.tree.map(made_up, planned.arguments))
        for _ in range(repeats + 1):
            if planned.values is not None:
                arguments = tuple(
                    jax.tree.map(
                        lambda value, shape: jax.device_put(value, shape.sharding),
                        planned.values(*arguments),
                        tuple(planned.arguments),
                    )
                )
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            result = jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
            arguments = _not_donated(arguments, result)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return statistics.median(seconds[1:]) / planned.units


def made_up(shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Small random numbers where floating-point ones are asked for, else ones; a key for a key."""
    return _maker(shape.shape, shape.dtype, shape.sharding)(jax.random.key(0))


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None) -> Any:
    def make(key: jax.Array) -> jax.Array:
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            return key
        if jnp.issubdtype(dtype, jnp.floating):
            return (PARAMETER_SCALE * jax.random.normal(key, shape, dtype)).astype(dtype)
        return jnp.ones(shape, dtype)

    return jax.jit(make, out_shardings=sharding)


def _not_donated(arguments: tuple[Any, ...], result: Any) -> tuple[Any, ...]:
    """The arguments with what a call gave in the place of the one it took, if it took one.

    A run's programs take one argument at most, a state, and give the next one alone or first.
    """
    new = result[0] if isinstance(result, tuple) else result
    taken = [any(leaf.is_deleted() for leaf in jax.tree.leaves(argument)) for argument in arguments]
    assert sum(taken) <= 1
    return tuple(
        new if was_taken else argument for argument, was_taken in zip(arguments, taken, strict=True)
    )
