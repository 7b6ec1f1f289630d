"""Layers as one program: a block under `nn.scan`, its inner values stored or computed again."""

from typing import Any

import flax.linen as nn
import jax

REMATS = ("none", "dots", "full")  # What a backward pass may recompute.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stack(
    block: type[nn.Module],
    length: int,
    remat: str,
    in_axes: Any = nn.broadcast,
) -> type[nn.Module]:
    """A module of `length` blocks, one after the other.

    Every parameter is stacked along a leading "layers" axis, so that a program's size does not grow
    with depth.

    Args:
        block: A module of the form (carry, *inputs) -> (carry, output).
        length: How many.
        remat: What the backward pass recomputes: "none", "dots" (all but products) or "full".
        in_axes: As `nn.scan`'s: by default all blocks get the same inputs.

    Returns:
        A class with the block's attributes; outputs are stacked along a leading axis.
    """
    if remat != "none":
        block = nn.remat(block, prevent_cse=False, policy=REMAT_POLICIES[remat])
    return nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
