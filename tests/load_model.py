"""A bare model from its files, as the tests of modules and weights want it."""

import functools

import jax
import jax.numpy as jnp

from expandr_jax.models.decoder import token_positions
from expandr_jax.models.mask import causal_mask
from expandr_jax.weights.families import model_config
from expandr_jax.weights.hf import load_module, open_model


def load_model(
    source, *, with_head=True, dtype=jnp.float32, compute_dtype=jnp.float32, sha256=None, mesh=None
):
    """The module, its parameters and their files; arguments as in `load_generator`."""
    files = open_model(source, sha256)
    config = model_config(files.config, files.model_type)
    module, params = load_module(files, config, with_head, dtype, compute_dtype, mesh)
    return module, params, files


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, ids, mask):
    """[batch, length, vocabulary] of a decoder, in one program: one by one its operations take
    several times as long to compile.
    """
    hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
    return module.apply({"params": params}, hidden, method="logits")
