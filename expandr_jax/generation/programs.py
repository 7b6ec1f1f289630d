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
from expandr_jax.sharding import adapter_shardings, batch_divisor, on_mesh
from expandr_jax.weights.trees import model_shardings

ROWS = PartitionSpec(("data", "fsdp"))
EVERYONE = PartitionSpec(("data", "fsdp", "tensor"))
PREFILL_TOKENS = 1024  # Of the prompts that are run together.


def prefill_rows(slots: int, bucket: int, mesh: Mesh | None) -> int:
    """Prompts of `bucket` tokens that are run together."""
    divisor = 1 if mesh is None else batch_divisor(mesh)
    return divisor * max(1, min(slots, PREFILL_TOKENS // bucket) // divisor)


def heads_axis(module: Decoder, mesh: Mesh | None) -> str | None:
    """The mesh axis that keys' and values' heads are split over."""
    if mesh is None or module.config.num_kv_heads % mesh.shape["tensor"]:
        return None
    return "tensor"


def variable_shardings(
    mesh: Mesh, module: Decoder, params: Mapping[str, Any], adapter: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Where an engine's variables lie, before `unstack_layers`: {"params"} and, if any, "lora".

    Args:
        mesh: The devices.
        module: The decoder.
        params: Base parameters, or their shapes; layers stacked.
        adapter: LoRA tree, or its shapes, or None.
    """
    placed = model_shardings(mesh, module.clone(unroll=False), params)
    if adapter is None:
        return {"params": placed}
    return {"params": placed, "lora": adapter_shardings(mesh, placed, adapter)}


def unstack_shardings(tree: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Shardings of what `unstack_layers` makes of a tree that lies as this one says."""
    tree = dict(tree)
    one = jax.tree.map(
        lambda x: NamedSharding(x.mesh, PartitionSpec(*x.spec[1:])), tree.pop("layers")
    )
    return tree | {f"layer_{i}": one for i in range(layers)}


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """All that an engine's programs are compiled for, beside the shapes of their arguments.

    Attributes:
        module: The decoder, its layers unrolled.
        slots: Texts sampled at once.
        length: Tokens that a slot has room for.
        max_new_tokens: Longest text.
        cache_dtype: Type of keys and values.
        penalize: Whether requests may have a repetition penalty.
        log_probs: Whether log-probabilities of sampled tokens are kept.
        seed: Seed of all draws.
        eos_ids: Tokens that end a text.
        mesh: Slots are split over its data and fsdp axes; None: one device.
        heads_axis: Mesh axis of keys' and values' heads; None: on every device.
    """

    module: Decoder
    slots: int
    length: int
    max_new_tokens: int
    cache_dtype: Any
    penalize: bool
    log_probs: bool
    seed: int
    eos_ids: tuple[int, ...]
    mesh: Mesh | None
    heads_axis: str | None


@dataclasses.dataclass(frozen=True)
class Programs:
    """Functions of `slots`, compiled when first called with arguments of a new shape.

    Attributes:
        empty: prefix -> Slots.
        prefill: (variables, tokens, length, prefix) -> Prefilled.
        insert: (slots, prompts, source, settings) -> Slots; the slots are donated.
        decode: (variables, slots, cancelled, steps, enough) -> Slots; the slots are donated.
        placed: Shardings of Slots; None on one device.
    """

    empty: Any
    prefill: Any
    insert: Any
    decode: Any
    placed: Any


def _together(sampler: Callable[..., Any], rows: NamedSharding) -> Callable[..., Any]:
    """The sampler, all but logits where a slot's row is: else the whole step is split as it is."""

    def placed(logits: jax.Array, *slots: Any) -> Any:
        slots = jax.lax.with_sharding_constraint(slots, rows)
        return jax.lax.with_sharding_constraint(sampler(logits, *slots), rows)

    return placed


@functools.lru_cache(maxsize=8)  # Each stage of a run makes an engine; most are of one shape.
def make_programs(shape: EngineShape) -> Programs:
    """The programs of all engines of one shape."""
    empty = functools.partial(
        device.empty_slots,
        shape.module,
        shape.slots,
        shape.length,
        shape.max_new_tokens,
        shape.cache_dtype,
        shape.penalize,
        shape.log_probs,
    )
    insert, sampler, placed, gathered = device.insert, sample, None, None
    on = functools.partial(on_mesh, shape.mesh) if shape.mesh is not None else lambda f: f
    if shape.mesh is not None:

        def place(specs):
            return jax.tree.map(lambda spec: NamedSharding(shape.mesh, spec), specs)

        heads = PartitionSpec(None, shape.heads_axis)
        caches = PartitionSpec(*ROWS, shape.heads_axis)
        arrays = jax.eval_shape(empty, None)
        specs = jax.tree.map(lambda x: caches if x.ndim == 4 else ROWS, arrays)
        prompts = device.Prefilled(heads, heads, PartitionSpec())
        placed, gathered = place(specs), place(prompts)
        split = functools.partial(jax.shard_map, mesh=shape.mesh, check_vma=False)
        insert = split(insert, in_specs=(specs, prompts, ROWS, ROWS), out_specs=specs)
        # Devices that share rows take a part of them each: every token is drawn once.
        rows = EVERYONE if shape.slots % shape.mesh.size == 0 else ROWS
        sampler = _together(split(sampler, in_specs=rows, out_specs=rows), place(ROWS))
    prefill = functools.partial(device.prefill, shape.module, dtype=shape.cache_dtype)
    decode = functools.partial(device.decode, shape.module, sampler, shape.seed, shape.eos_ids)
    return Programs(
        jax.jit(empty, out_shardings=placed),
        jax.jit(on(prefill), out_shardings=gathered),
        jax.jit(insert, donate_argnums=0, out_shardings=placed),
        jax.jit(on(decode), donate_argnums=1, out_shardings=placed),
        placed,
    )
