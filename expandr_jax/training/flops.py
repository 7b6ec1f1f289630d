"""Floating-point operations from shapes: XLA's own count takes a scan's body once.

A multiplication with an addition counts as two. Only matrix products count, and attention with all
pairs of tokens, masked or not, as the model-FLOPs utilisation of PaLM (arXiv 2204.02311) has it.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax import traverse_util

from expandr_jax.models.quantized import whole_shape
from expandr_jax.weights.families import family_of

TRAINING = 3  # A backward pass takes two forward ones: for the inputs and for the weights.
FROZEN = 2  # Where the weights are frozen, that for the inputs is all.


def forward_flops(
    module: nn.Module,
    params: Mapping[str, Any],
    rows: int,
    length: int,
    *,
    keys: int | None = None,
    logits: int = 0,
) -> int:
    """Floating-point operations of one forward pass.

    Args:
        module, params: The model, and its parameters or their shapes, layers stacked.
        rows: Texts.
        length: Tokens of each that are run.
        keys: Tokens that each of these attends to; None: `length`.
        logits: Tokens, of all rows together, that the vocabulary's logits are computed for.
    """
    family, config = family_of(module), module.config
    total = rows * family.attention_flops(config, length, length if keys is None else keys)
    for path, leaf in traverse_util.flatten_dict(params).items():
        if path[-1] == "kernel":
            total += 2 * math.prod(whole_shape(leaf)) * rows * family.kernel_tokens(path, length)
    return total + 2 * config.hidden_size * config.vocab_size * logits


def row_flops(module: nn.Module, params: Mapping[str, Any], frozen: bool) -> Callable[[int], int]:
    """Length -> operations of a training step's row of so many tokens."""
    passes = FROZEN if frozen else TRAINING
    return functools.cache(lambda length: passes * forward_flops(module, params, 1, length))
