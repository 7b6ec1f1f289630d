"""Takes the most important heads and channels of each layer, and leaves the rest."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.models.generator import Generator
from expandr_jax.pruning.importance import CHANNELS, HEADS
from expandr_jax.weights.families import model_config
from expandr_jax.weights.fields import Fields


def most_important(importances: jax.Array, count: int) -> np.ndarray:
    """[layers, count] indices of the largest values of each row, in rising order; ties: the lower.

    All of them, in their order, where `count` is all.
    """
    order = np.argsort(-np.asarray(importances), axis=1, kind="stable")
    return np.sort(order[:, :count], axis=1)


def taken(
    params: Mapping[str, Any], config: DecoderConfig, groups: np.ndarray, channels: np.ndarray
) -> dict[str, Any]:
    """A decoder's parameters without what is not taken.

    Args:
        params: With stacked layers.
        config: Their shape.
        groups: [layers, kept] key-value groups of each layer, which stay in this order.
        channels: [layers, kept] feed-forward channels.
    """

    def taken_of(path: tuple[Any, ...], leaf: Any) -> Any:
        name = "/".join(part.key for part in path)
        for axes, count, kept in (
            (HEADS, config.num_kv_heads, groups),
            (CHANNELS, config.mlp_dim, channels),
        ):
            if name in axes:
                return _units(leaf, axes[name] + 1, count, kept)
        return leaf

    layers = jax.tree_util.tree_map_with_path(taken_of, params["layers"])
    return {**params, "layers": layers}


def _units(leaf: Any, axis: int, count: int, kept: np.ndarray) -> Any:
    """The pieces that each layer keeps, of `count` equal ones along an axis of a stack."""
    width = leaf.shape[axis] // count
    indices = (kept[:, :, None] * width + np.arange(width)).reshape(len(kept), -1)
    shape = [1] * leaf.ndim
    shape[0], shape[axis] = indices.shape
    return jnp.take_along_axis(leaf, indices.reshape(shape), axis=axis)


def resized(generator: Generator, config: DecoderConfig) -> Generator:
    """A generator of another shape, whose config.json says so."""
    own = generator.files.config
    values = {
        **own.values,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,  # No longer the width divided by the heads.
        "intermediate_size": config.mlp_dim,
    }
    fields = Fields(values, own.where)
    found = model_config(fields, generator.files.model_type)
    assert found == dataclasses.replace(config, quantized=found.quantized), (found, config)
    files = dataclasses.replace(generator.files, config=fields)
    return dataclasses.replace(generator, module=generator.module.clone(config=config), files=files)
