"""The compiled programs of training and encoding, each made in one place.

A run calls them with arrays; `train.plan` compiles the same for other machines, from shapes alone.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from expandr_jax.models.retriever import Retriever
from expandr_jax.sharding import batch_sharding, on_mesh, param_shardings, replicated
from expandr_jax.training.train_state import TrainState
from expandr_jax.weights.families import example_inputs

Program = Callable[..., Any]


def embedder(mesh: Mesh, retriever: Retriever, params: Mapping[str, Any] | None = None) -> Program:
    """(params, ids, mask) -> vectors [rows, width], rows spread over the mesh.

    Args:
        mesh: The devices.
        retriever: Module, pooling and normalisation.
        params: Shardings of the parameters; None: as those of the first call lie.
    """
    rows = batch_sharding(mesh)
    return jax.jit(on_mesh(mesh, retriever.embed), in_shardings=(params, rows, rows))


def training_program(
    mesh: Mesh,
    state: TrainState,
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    *frozen: Any,
) -> Program:
    """(state, ..., batch, key) -> (state, metrics), the state donated.

    Args:
        mesh: The devices.
        state: Shardings of the state, from `TrainState.shardings`.
        step: The same as a plain function.
        *frozen: Shardings of what it takes between the state and the batch.
    """
    return jax.jit(
        on_mesh(mesh, step),
        in_shardings=(state, *frozen, batch_sharding(mesh), None),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )


@functools.lru_cache(maxsize=64)  # Encoding asks for it at each call.
def _module_shardings(mesh: Mesh, module: nn.Module) -> Mapping[str, Any]:
    return param_shardings(mesh, module, *example_inputs(module))


def model_shardings(mesh: Mesh, module: nn.Module, params: Mapping[str, Any]) -> dict[str, Any]:
    """Where a model's parameters belong on a mesh.

    Args:
        mesh: The devices.
        module: Names the axes of its parameters.
        params: The parameters, or their shapes. Those that are not the module's, as of a layer
            after pooling, are on every device.
    """
    own = _module_shardings(mesh, module.clone(remat="none"))
    everywhere = replicated(mesh)
    return {
        name: own[name] if name in own else jax.tree.map(lambda _: everywhere, tree)
        for name, tree in params.items()
    }
