"""What all models are made of: sizes, parameters with named axes, and layers as one program."""

import contextvars
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_NORMAL = nn.initializers.normal(0.02)
REMATS = ("none", "dots", "full")  # What a backward pass may recompute.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
_shapes_alone = contextvars.ContextVar("shapes_alone", default=False)


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The sizes that every model has.

    Attributes:
        vocab_size: Rows of the token table.
        hidden_size: Width of the residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads; of a decoder, those of the queries.
        mlp_dim: Inner width of the feed-forward.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_dim: int


def parameter(
    module: nn.Module,
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    init: nn.initializers.Initializer = _NORMAL,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """A parameter of a module; `axes` are names that `sharding.RULES` spreads over a mesh."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


def initial_shapes(module: nn.Module, *args: Any) -> Any:
    """Shapes of a module's variables, in their boxes, for what it is called with.

    They are those of `module.init`; blocks are traced once for them, not twice.
    """
    token = _shapes_alone.set(True)
    try:
        # JAX keeps traces by function, and no other use of `init` may have this one.
        return jax.eval_shape(lambda *a: module.init(*a), jax.random.key(0), *args)
    finally:
        _shapes_alone.reset(token)


def stack(
    block: type[nn.Module],
    length: int,
    remat: str,
    in_axes: Any = nn.broadcast,
) -> type[nn.Module]:
    """A module of `length` blocks, one after the other, under `nn.scan`.

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
        # Flax's check traces a block once more, by which random numbers of blocks are others.
        check_constancy_invariants=not _shapes_alone.get(),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
