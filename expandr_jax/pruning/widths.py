"""How many heads and channels each layer keeps, so that an ordinary config.json holds the model."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from expandr_jax.errors import UserError
from expandr_jax.models.decoder import DecoderConfig

# So many channels of wide models go together: a row of llama.cpp's q8_0 has blocks of 32.
_STEP, _WIDE = 32, 1024


def count_params(params: Any) -> int:
    """Numbers in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def pruned_config(config: DecoderConfig, params: Mapping[str, Any], keep: float) -> DecoderConfig:
    """The shape of a decoder with a share of its parameters.

    Every layer keeps as many key-value groups, with all of their query heads, as come nearest to
    the share of the layers' parameters that is left; feed-forward channels take up the rest. The
    width of a head stays. transformers wants the hidden width to be a multiple of the heads.

    Args:
        config: The shape as it is.
        params: The parameters, or their shapes.
        keep: The share of all parameters, above 0 and up to 1. Embeddings, norms and the head of
            the model count, and stay.

    Raises:
        UserError: So few cannot be left.
    """
    if keep == 1:
        return config
    group = config.num_heads // config.num_kv_heads
    total, bias = count_params(params), int(config.qkv_bias)
    of_group = config.head_dim * ((2 * group + 2) * config.hidden_size + bias * (group + 2))
    of_channel = 3 * config.hidden_size
    of_layer = config.num_kv_heads * of_group + config.mlp_dim * of_channel
    left = of_layer - (1 - keep) * total / config.num_layers  # Parameters of a layer.
    step = _STEP if config.mlp_dim >= _WIDE else 1
    divides = config.hidden_size % config.num_heads == 0
    wanted = left / of_layer * config.num_kv_heads
    groups = [
        count
        for count in range(1, config.num_kv_heads + 1)
        if not (divides and config.hidden_size % (count * group))
    ]
    for count in sorted(groups, key=lambda count: (abs(count - wanted), -count)):
        channels = round((left - count * of_group) / of_channel / step) * step
        if 0 < channels <= config.mlp_dim:
            return dataclasses.replace(
                config, num_heads=count * group, num_kv_heads=count, mlp_dim=channels
            )
    rest = total - config.num_layers * of_layer
    raise UserError(
        f"keep={keep}: cannot be had; {rest} of {total} parameters are no heads and no channels, "
        "and each layer keeps one group of heads and a channel at least"
    )
