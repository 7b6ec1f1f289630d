"""The compiled programs of an engine, shared by engines of one shape."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from expandr_jax.generation import slots as device
from expandr_jax.generation.sampling import sample
from expandr_jax.models.decoder import Decoder
from expandr_jax.sharding import adapter_shardings, on_mesh
from expandr_jax.weights.trees import model_shardings

ROW_SPEC = PartitionSpec(("data", "fsdp"))
EVERYONE = PartitionSpec(("data", "fsdp", "tensor"))


def variable_shardings(
    mesh: Mesh, module: Decoder, params: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Where an engine's variables lie, before `unstack_layers`: "params" and, if any, "lora".

    Parameters, whose layers are stacked, and the adapter may be shapes.
    """
    base = model_shardings(mesh, module.clone(unroll=False), params)
    if adapter is None:
        return {"params": base}
    return {"params": base, "lora": adapter_shardings(mesh, base, adapter)}


def unstack_shardings(tree: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Shardings of what `unstack_layers` makes of a tree that lies as this one says."""
    tree = dict(tree)
    one = jax.tree.map(
        lambda x: NamedSharding(x.mesh, PartitionSpec(*x.spec[1:])), tree.pop("layers")
    )
    return tree | {f"layer_{i}": one for i in range(layers)}


@dataclasses.dataclass(frozen=True)
class Programs:
    """Functions of `slots`, compiled when first called with arguments of a new shape.

    Attributes:
        empty: prefix -> Slots.
        prefill: (variables, tokens, length, prefix) -> Prefilled.
        insert: (slots, prompts, source, settings) -> Slots; the slots are donated.
        decode: (variables, slots, cancelled, steps, enough) -> Slots; the slots are donated.
        shardings: Those of Slots.
        prompts: Those of Prefilled.
    """

    empty: Any
    prefill: Any
    insert: Any
    decode: Any
    shardings: device.Slots
    prompts: device.Prefilled


def _together(sampler: Callable[..., Any], rows: NamedSharding) -> Callable[..., Any]:
    """The sampler, all but logits where a slot's row is: else the whole step is split as it is."""

    def constrained(logits: jax.Array, *slots: Any) -> Any:
        slots = jax.lax.with_sharding_constraint(slots, rows)
        return jax.lax.with_sharding_constraint(sampler(logits, *slots), rows)

    return constrained


@functools.lru_cache(maxsize=8)  # Each stage of a run makes an engine; most are of one shape.
def make_programs(shape: device.EngineShape) -> Programs:
    """The programs of all engines of one shape."""
    mesh = shape.mesh
    empty, prefill = (functools.partial(f, shape) for f in (device.empty_slots, device.prefill))

    def shardings(specs: Any) -> Any:
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    heads = PartitionSpec(None, shape.heads_axis)
    caches = PartitionSpec(*ROW_SPEC, shape.heads_axis)
    slots = jax.tree.map(lambda x: caches if x.ndim == 4 else ROW_SPEC, jax.eval_shape(empty, None))
    prompts = device.Prefilled(heads, heads, PartitionSpec())
    split = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    insert = split(device.insert, in_specs=(slots, prompts, ROW_SPEC, ROW_SPEC), out_specs=slots)
    # Devices that share rows take a part of them each: every token is drawn once.
    rows = EVERYONE if shape.slots % mesh.size == 0 else ROW_SPEC
    sampler = _together(split(sample, in_specs=rows, out_specs=rows), shardings(ROW_SPEC))
    decode = functools.partial(device.decode, shape, sampler)
    return Programs(
        jax.jit(empty, out_shardings=shardings(slots)),
        jax.jit(on_mesh(mesh, prefill), out_shardings=shardings(prompts)),
        jax.jit(insert, donate_argnums=0, out_shardings=shardings(slots)),
        jax.jit(on_mesh(mesh, decode), donate_argnums=1, out_shardings=shardings(slots)),
        shardings(slots),
        shardings(prompts),
    )
