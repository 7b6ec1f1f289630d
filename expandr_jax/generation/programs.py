"""The compiled programs of an engine, shared by engines of one shape."""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from expandr_jax.generation import slots as device
from expandr_jax.generation.sampling import sample
from expandr_jax.models.decoder import Decoder

ROWS = PartitionSpec(("data", "fsdp"))


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that an engine's programs are compiled for, beside the shapes of their arguments.

    Attributes:
        module: The decoder, its layers unrolled.
        slots: Texts sampled at once.
        length: Tokens that a slot has room for.
        max_new_tokens: Longest text.
        cache_dtype: Of keys and values.
        penalize: Whether requests may have a repetition penalty.
        seed: Of all draws.
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
    """

    empty: Any
    prefill: Any
    insert: Any
    decode: Any


@functools.lru_cache(maxsize=8)  # Each stage of a run makes an engine; most are of one shape.
def make_programs(shape: Shape) -> Programs:
    """The programs of all engines of one shape."""
    empty = functools.partial(
        device.empty_slots,
        shape.module,
        shape.slots,
        shape.length,
        shape.max_new_tokens,
        shape.cache_dtype,
        shape.penalize,
    )
    insert, sampler, placed, gathered = device.insert, sample, None, None
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
        sampler = split(sampler, in_specs=ROWS, out_specs=ROWS)
    prefill = functools.partial(device.prefill, shape.module, dtype=shape.cache_dtype)
    decode = functools.partial(device.decode, shape.module, sampler, shape.seed, shape.eos_ids)
    return Programs(
        jax.jit(empty, out_shardings=placed),
        jax.jit(prefill, out_shardings=gathered),
        jax.jit(insert, donate_argnums=0, out_shardings=placed),
        jax.jit(decode, donate_argnums=1, out_shardings=placed),
    )
