"""A bare model from its files, as the tests of modules and weights want it."""

import jax.numpy as jnp

from expandr_jax.weights.families import model_config
from expandr_jax.weights.hf import load_module, open_model, origin


def load_model(
    source, *, with_head=True, dtype=jnp.float32, compute_dtype=jnp.float32, sha256=None, mesh=None
):
    """The module, its parameters and where they came from; arguments as in `load_generator`."""
    files, adapter = open_model(source, sha256)
    config = model_config(files.config, files.model_type)
    module, params = load_module(files, config, adapter, with_head, dtype, compute_dtype, mesh)
    return module, params, origin(source, files)
