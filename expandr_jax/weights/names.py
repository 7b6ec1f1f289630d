"""Where each Hugging Face tensor sits in our parameter trees: one table for both directions.

A PyTorch linear weight is [out, in], ours [in, out]; `{}` in a name stands for the layer's number,
which is the leading axis of our stacked parameters.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Weight:
    """One leaf of a parameter tree and the Hugging Face tensor, or stack of tensors, it holds.

    Attributes:
        path: Keys of the leaf, joined by "/".
        name: The tensor's name without the model's prefix; `{}` is the layer's number.
        transpose: The tensor is [out, in] and the leaf [in, out].
        copies: Names under which files may hold the same tensor again, or instead.
        bare: No prefix stands before its name, as before a head's.
        first: Number of the layer that a stack begins with.
    """

    path: str
    name: str
    transpose: bool = False
    copies: tuple[str, ...] = ()
    bare: bool = False
    first: int = 0

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


def linear(path: str, name: str, bias: bool, **options: Any) -> Iterator[Weight]:
    """The kernel of a linear layer and, if it has one, its bias; the options are `Weight`'s."""
    yield Weight(f"{path}/kernel", f"{name}.weight", True, **options)
    if bias:
        yield Weight(f"{path}/bias", f"{name}.bias", **options)


def layer_norm(path: str, name: str, bias: bool = True, **options: Any) -> Iterator[Weight]:
    """The scale of a layer norm and, if it has one, its bias; the options are `Weight`'s."""
    yield Weight(f"{path}/scale", f"{name}.weight", **options)
    if bias:
        yield Weight(f"{path}/bias", f"{name}.bias", **options)


def hf_name(weight: Weight, index: int, prefix: str) -> str:
    """The full name of a tensor in a file: the one at `index` of a stack."""
    return ("" if weight.bare else prefix) + weight.name.format(weight.first + index)
