"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) as a tree of their own.

The base parameters are never touched: a module is applied to `{"params": base}` for the reference
model and to `{"params": base, "lora": adapter}` for the adapted one. Optimizers see the adapter
only.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from expandr_jax.errors import UserError
from expandr_jax.models.product import product
from expandr_jax.models.quantized import (
    is_quantized,
    kept_shapes,
    kept_type,
    quantized_product,
    whole_shape,
)
from expandr_jax.models.stack import parameter
from expandr_jax.settings import PATTERN, Positive, count, number, several

COLLECTION = "lora"  # The name of an adapter's variables.


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which projections get an adapter, and its size.

    Attributes:
        rank: Inner width r of the update B A.
        alpha: The update is scaled by alpha / rank.
        dropout: Rate of dropout on the adapter's input, in training only.
        targets: Regular expressions searched in a projection's path, e.g. "q_proj$".
    """

    rank: Annotated[int, count(1)] = 8
    alpha: Positive = 32.0
    dropout: Annotated[float, number(least=0, below=1)] = 0.1
    targets: Annotated[tuple[str, ...], several(PATTERN)] = ("q_proj$", "v_proj$")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class OptionalLora(LoraConfig):
    """An adapter where `rank` is above 0, and else none."""

    rank: Annotated[int, count(0)] = 0
    dropout: Annotated[float, number(least=0, below=1)] = 0.0
    targets: Annotated[tuple[str, ...], several(PATTERN)] = ("_proj$",)


class Projection(nn.Module):
    """x W (+ b), plus the low-rank update where the "lora" collection holds one for it.

    Attributes:
        features: Output width.
        axes: Logical names of the kernel's input and output axes.
        use_bias: Adds a bias.
        dtype: Compute type; parameters keep theirs.
        lora: Scale and dropout of the update; which projections have one is decided by the tree.
        quantized: One of `QUANTIZED_TYPES`, for a W that is not trained; "": as numbers.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    dtype: Any = jnp.float32
    lora: LoraConfig | None = None
    quantized: str = ""

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        if self.quantized:
            form, sizes = self.quantized, (x.shape[-1], self.features)
            kept, scales = kept_shapes(form, *sizes)
            kept = parameter(self, "kernel", self.axes, kept, zeros, kept_type(form))
            scale = parameter(self, "kernel_scale", self.axes[-len(scales) :], scales, ones)
            y = quantized_product(form, x.astype(self.dtype), kept, scale)
        else:
            sizes, normal = (x.shape[-1], self.features), nn.initializers.lecun_normal()
            kernel = parameter(self, "kernel", self.axes, sizes, normal)
            y = product(x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = parameter(self, "bias", self.axes[1:], (self.features,), zeros)
            y = y + bias.astype(self.dtype)
        if self.lora is not None and self.has_variable(COLLECTION, "a"):
            h = nn.Dropout(self.lora.dropout)(x, deterministic=deterministic)
            a = self.get_variable(COLLECTION, "a").astype(self.dtype)
            b = self.get_variable(COLLECTION, "b").astype(self.dtype)
            y = y + product(product(h.astype(self.dtype), a), b) * self.lora.scale
        return y


def with_adapter(params: Mapping[str, Any], adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    """An encoder's parameters with an adapter beside them, as `Retriever.embed` takes them.

    Nothing is merged or copied: retrievers of one base share its arrays.
    """
    base, _ = split_adapter(params)
    return base if adapter is None else {**base, COLLECTION: adapter}


def split_adapter(params: Mapping[str, Any]) -> tuple[dict[str, Any], Any | None]:
    """The base's parameters and the adapter beside them; None where there is none."""
    base = dict(params)
    adapter = base.pop(COLLECTION, None)
    return base, adapter


def init_lora(
    key: jax.Array, params: Mapping[str, Any], config: LoraConfig, section: str = "lora"
) -> dict[str, Any]:
    """Creates an adapter that does not yet change the model: A uniform as in PEFT, B zero.

    Args:
        key: PRNG key.
        params: The base's parameters (arrays or shapes); kernels are [..., in, out].
        config: Rank and targets.
        section: What the config calls them, for messages.

    Returns:
        A tree with "a" [..., in, rank] and "b" [..., rank, out], float32, for each matched kernel.

    Raises:
        UserError: If a pattern matches no projection, or the rank is above that of a whole update.
    """
    flat = traverse_util.flatten_dict(params)
    kernels = {path[:-1]: whole_shape(leaf) for path, leaf in flat.items() if path[-1] == "kernel"}
    for pattern in config.targets:
        if not any(re.search(pattern, "/".join(path)) for path in kernels):
            known = ", ".join(sorted({path[-1] for path in kernels}))
            raise UserError(
                f"{section}.targets: {pattern!r} matches no projection; there are: {known}"
            )
    adapter = {}
    for index, (path, shape) in enumerate(sorted(kernels.items())):
        if any(re.search(pattern, "/".join(path)) for pattern in config.targets):
            *stack, width_in, width_out = shape
            if config.rank > min(width_in, width_out):
                raise UserError(
                    f"LoRA rank {config.rank} is above {min(width_in, width_out)}, the lesser side "
                    f"of {'/'.join(path)}; lower {section}.rank"
                )
            bound = 1.0 / math.sqrt(width_in)
            adapter[(*path, "a")] = jax.random.uniform(
                jax.random.fold_in(key, index),
                (*stack, width_in, config.rank),
                minval=-bound,
                maxval=bound,
            )
            adapter[(*path, "b")] = jnp.zeros((*stack, config.rank, width_out))
    return traverse_util.unflatten_dict(adapter)


def merge_lora(
    params: Mapping[str, Any], adapter: Mapping[str, Any], config: LoraConfig
) -> dict[str, Any]:
    """Adds the adapter's update to the base kernels: W + (alpha / r) A B, computed in float32.

    Args:
        params: Base parameters.
        adapter: The tree made by `init_lora`, trained.
        config: The adapter's settings.

    Returns:
        Parameters of the same structure and types as `params`.

    Raises:
        UserError: If the base is in 8 or 4 bits, which hold no such small updates.
    """
    flat = dict(traverse_util.flatten_dict(params))
    update = traverse_util.flatten_dict(adapter)
    for path in {path[:-1] for path in update}:
        kernel = flat[(*path, "kernel")]
        if is_quantized(kernel):
            raise UserError(
                "an adapter cannot be merged into weights in 8 or 4 bits: load the base in float32"
            )
        a, b = (update[(*path, name)].astype(jnp.float32) for name in ("a", "b"))
        delta = jnp.matmul(a, b) * config.scale
        flat[(*path, "kernel")] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    return traverse_util.unflatten_dict(flat)
