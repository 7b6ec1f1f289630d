"""A model's parameters as a tree: where they belong on a mesh, and their hash."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from expandr_jax.models.lora import COLLECTION
from expandr_jax.sharding import adapter_shardings, host_part, param_shardings, replicated
from expandr_jax.weights.families import example_inputs

PART_BYTES = 64 * 2**20  # What a host is sent at once of parameters on devices.


def hash_tree(tree: Any) -> str:
    """sha256 over every leaf's path, type, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        rows, *rest = leaf.shape or (1,)
        step = max(1, PART_BYTES * rows // max(1, leaf.nbytes))
        for start in range(0, rows, step):
            part = [slice(start, start + step), *map(slice, rest)] if leaf.ndim else []
            array = host_part(leaf, part)
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


@functools.lru_cache(maxsize=64)  # Encoding asks for it at each call.
def module_shardings(mesh: Mesh, module: nn.Module) -> Mapping[str, Any]:
    """Where a module's own parameters belong on a mesh."""
    return param_shardings(mesh, module, *example_inputs(module))


def model_shardings(mesh: Mesh, module: nn.Module, params: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model's parameters belong on a mesh.

    Args:
        mesh: The devices.
        module: Names the axes of its parameters.
        params: The parameters, or their shapes. Those that are not the module's, as of a layer
            after pooling, are on every device; an adapter beside them lies as its kernels do.
    """
    own = module_shardings(mesh, module.clone(remat="none", lora=None))
    everywhere = replicated(mesh)

    def shardings_of(name: str, tree: Any) -> Any:
        if name in own:
            return own[name]
        if name == COLLECTION:
            return adapter_shardings(mesh, own, tree)
        return jax.tree.map(lambda _: everywhere, tree)

    return {name: shardings_of(name, tree) for name, tree in params.items()}
