"""Floating-point operations from shapes: XLA's own count takes a scan's body once.

A multiplication with an addition counts as two. Only matrix products count, and attention with all
pairs of tokens, masked or not, as the model-FLOPs utilisation of PaLM (arXiv 2204.02311) has it.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from flax import traverse_util

from expandr_jax.models.anchordr import AnchorDr
from expandr_jax.models.bert import Bert
from expandr_jax.models.decoder import Decoder

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
    """Of one forward pass.

    Args:
        module: The model.
        params: Its parameters or their shapes, layers stacked.
        rows: Texts.
        length: Tokens of each that are run.
        keys: Tokens that each of these attends to; None: `length`.
        logits: Tokens, of all rows together, that the vocabulary's logits are computed for.
    """
    keys = length if keys is None else keys
    flat = traverse_util.flatten_dict(params)
    total = 0
    for path, leaf in flat.items():
        if path[-1] == "kernel":
            total += 2 * math.prod(leaf.shape) * rows * _tokens(module, path, length)
    config = module.config
    if isinstance(module, AnchorDr):
        pairs = config.num_layers * length * length + config.num_decoder_layers * (1 + length)
        total += 4 * config.hidden_size * rows * pairs
    else:
        bert = isinstance(module, Bert)
        width = config.hidden_size if bert else config.num_heads * config.head_dim
        total += 4 * width * rows * config.num_layers * length * keys
    if isinstance(module, Decoder):
        total += 2 * config.hidden_size * config.vocab_size * logits
    return total


def _tokens(module: nn.Module, path: tuple[str, ...], length: int) -> int:
    """Tokens of a text that a kernel is applied to: AnchorDR's decoder takes one step."""
    if not isinstance(module, AnchorDr) or path[0] != "decoder":
        return length
    return length if "cross_attn" in path and path[-2] in ("k_proj", "v_proj") else 1
