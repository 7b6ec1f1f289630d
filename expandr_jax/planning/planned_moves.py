"""Programs between a run's steps, as shapes: moves of parameters, restores, rewards.

Of trees whose leaves go through one by one, the largest leaf is planned, beside all others.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from expandr_jax.config import Config
from expandr_jax.models.decoder import unstack_layers
from expandr_jax.planning.planned import DEPTH, Planned
from expandr_jax.planning.topology import Topology
from expandr_jax.sharding import batch_divisor, bytes_on_device, gathering, replicated
from expandr_jax.training.checkpoint import checksum_program
from expandr_jax.vectors.query import fuse


def spread_leaves(params: Any) -> list[Any]:
    """Shapes of those parameters of which no chip of their mesh holds all."""
    return [leaf for leaf in jax.tree.leaves(params) if not leaf.sharding.is_fully_replicated]


def planned_gathering(params: Any, mesh: Mesh, module: nn.Module) -> Planned:
    """A block of the largest parameter that is spread over a mesh, on its way to every host."""
    leaf = max(spread_leaves(params), key=lambda leaf: leaf.size)
    program, block, parts = gathering(leaf)
    start = jax.ShapeDtypeStruct((len(leaf.shape),), jnp.int32, sharding=replicated(mesh))
    return _moved(
        program=program,
        arguments=(leaf, start),
        mesh=mesh,
        module=module,
        moved=math.prod(block) * leaf.dtype.itemsize * (len(parts) + 1),
        change="a smaller expandr_jax.sharding.WHOLE_BYTES",
        resident=-bytes_on_device(leaf),  # It is of the parameters that are held.
    )


def restored(state: Any, mesh: Mesh, topology: Topology, module: nn.Module) -> Planned:
    """The check of a state that was read from a checkpoint, which stands beside the first one."""
    leaf = max(jax.tree.leaves(state), key=bytes_on_device)
    return _moved(
        program=checksum_program(mesh if topology.hosts > 1 else None),
        arguments=(leaf,),
        mesh=mesh,
        module=module,
        moved=bytes_on_device(leaf),
        change="more fsdp in the mesh of what is trained",
        resident=2 * bytes_on_device(state) - bytes_on_device(leaf),
    )


def unstacked(stacked: Any, variables: Any, mesh: Mesh, module: nn.Module, shares: int) -> Planned:
    """The largest parameter of all layers on sampling's mesh, becoming the layers' own.

    Args:
        stacked: The layers' parameters, with shardings on the mesh.
        variables: All of the engine's, of which those that came before it lie there, too.
        mesh, module, shares: As `Planned` has them.
    """
    leaf = max(jax.tree.leaves(stacked), key=bytes_on_device)
    return _moved(
        program=jax.jit(lambda leaf: unstack_layers({"layers": leaf})),
        arguments=(leaf,),
        mesh=mesh,
        module=module,
        moved=2 * bytes_on_device(leaf),
        change="a larger tensor axis in mesh.sampling",
        resident=bytes_on_device(variables) - bytes_on_device(leaf),  # Its layers are results.
        shares=shares,
    )


def merged(adapter: Any, topology: Topology, module: nn.Module, name: str = "lora.rank") -> Planned:
    """The product of the largest pair of an adapter's matrices, for a tensor that is exported."""
    sides = [leaf.shape[-2:] for leaf in jax.tree.leaves(adapter)]
    rank = min(min(shape) for shape in sides)
    width = max(max(shape) for shape in sides)
    on_one = SingleDeviceSharding(topology.devices[0])
    a, b = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=on_one)
        for shape in ((width, rank), (rank, width))
    )
    return _moved(
        program=jax.jit(functools.partial(jnp.matmul, precision="highest")),
        arguments=(a, b),
        mesh=None,
        module=module,
        moved=4 * width * (2 * rank + width),
        change=f"a smaller {name}",
        forward_flops=2 * width * rank * width,
    )


def rewarded(
    config: Config, rows: int, width: int, topology: Topology, module: nn.Module
) -> Planned:
    """So many candidates that are rewarded together, each fused with its query, on one device."""
    on_one = SingleDeviceSharding(topology.devices[0])

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on_one)

    options = {
        "query_weight": config.reward.query_weight,
        "normalize": config.contrastive.normalize,
    }
    return _moved(
        program=jax.jit(functools.partial(fuse, **options)),
        arguments=(array(rows, width), array(rows, 1, width), array(rows, 1, dtype=jnp.bool_)),
        mesh=None,
        module=module,
        moved=4 * 3 * rows * width,
        change="fewer candidates of a query",
        forward_flops=8 * rows * width,
        resident=config.search.exact.held_bytes(width, DEPTH),  # The corpus' index stays.
    )


def _moved(
    *, arguments: Sequence[Any], mesh: Mesh | None, forward_flops: int = 0, **values: Any
) -> Planned:
    """What looks at its first argument, and has no texts: one row for each part of a batch."""
    return Planned(
        arguments=arguments,
        parameters=arguments[:1],
        mesh=mesh,
        rows=1 if mesh is None else batch_divisor(mesh),
        tokens=0,
        forward_flops=forward_flops,
        **values,
    )
