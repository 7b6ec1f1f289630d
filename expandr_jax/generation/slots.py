"""The device's side of sampling: slots that hold one text each, and the programs that move them.

Every array of `Slots` has one row per slot. A slot's numbers depend on its own row alone and all
shapes are fixed, so a text comes out the same whichever slot it takes and whatever runs beside it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from expandr_jax.generation.sampling import (
    BROKEN,
    RowSampling,
    log_probability,
    penalize_repetition,
)
from expandr_jax.models.decoder import Decoder, KVCache, token_positions
from expandr_jax.models.mask import causal_mask
from expandr_jax.sharding import batch_divisor

PREFILL_TOKENS = 1024  # The prompts that are run together have no more.


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """All that an engine's programs are compiled for, beside the shapes of their arguments.

    Attributes:
        module: The decoder, its layers unrolled.
        slots: Texts sampled at once.
        length: Tokens that a slot has room for.
        max_new_tokens: Longest text of any request.
        seed: Seed of all draws.
        eos_ids: Tokens that end a text.
        mesh: Slots are split over its data and fsdp axes, heads over its tensor axis.
        penalize: Requests may have a repetition penalty; it costs a byte per slot and vocabulary
            entry.
        log_probs: Log-probabilities of sampled tokens are kept.
    """

    module: Decoder
    slots: int
    length: int
    max_new_tokens: int
    seed: int
    eos_ids: tuple[int, ...]
    mesh: Mesh
    penalize: bool = False
    log_probs: bool = False

    @property
    def cache_dtype(self) -> jnp.dtype:
        """Type of keys and values: the compute type, but float32 on CPU, where it is quicker."""
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        return jnp.dtype(jnp.float32 if on_cpu else self.module.dtype)

    @property
    def heads_axis(self) -> str | None:
        """The mesh axis that keys' and values' heads are split over; None: every device has all."""
        divides = self.module.config.num_kv_heads % self.mesh.shape["tensor"] == 0
        return "tensor" if divides else None

    def prefill_rows(self, bucket: int) -> int:
        """Prompts of `bucket` tokens that are run together."""
        divisor = batch_divisor(self.mesh)
        return divisor * max(1, min(self.slots, PREFILL_TOKENS // bucket) // divisor)


@flax.struct.dataclass
class SlotSettings:
    """What a request asks for, [slots] each.

    Attributes:
        token: The prompt's last token, int32; those before it are in the cache.
        length: Number of those, int32.
        limit: Most tokens to sample, int32.
        stream: 32 bits from the request's id, uint32.
        sample: The request's index, int32.
        sampling: Temperature and filters.
        penalty: Repetition penalty, float32.
    """

    token: jax.Array
    length: jax.Array
    limit: jax.Array
    stream: jax.Array
    sample: jax.Array
    sampling: RowSampling
    penalty: jax.Array


@flax.struct.dataclass
class Slots:
    """Texts being sampled.

    Attributes:
        cache: Keys and values of each slot's tokens.
        settings: What each slot was asked for.
        token: [slots] int32, the next to feed.
        active: [slots] bool, False once a text is finished.
        count: [slots] int32, tokens sampled.
        output: [slots, max_new_tokens] int32, these tokens; the last may be `sampling.BROKEN`.
        near_tie: [slots, max_new_tokens] bool, from `sample`.
        log_probs: [slots, max_new_tokens] float32, as `Completion` has them; None without.
        seen: [slots, vocabulary] bool, for the repetition penalty; None without.
    """

    cache: KVCache
    settings: SlotSettings
    token: jax.Array
    active: jax.Array
    count: jax.Array
    output: jax.Array
    near_tie: jax.Array
    log_probs: jax.Array | None
    seen: jax.Array | None


@flax.struct.dataclass
class Prefilled:
    """Keys and values of prompts, ready to be copied into slots.

    Attributes:
        keys: Per layer [prompts, kv_heads, head_dim, length], without the common prefix.
        values: Per layer [prompts, kv_heads, length, head_dim], without it too.
        tokens: [prompts, prefix + length] int32.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    tokens: jax.Array


def empty_settings(slots: int) -> SlotSettings:
    """Settings of slots that nothing was asked of."""
    whole, real = jnp.zeros(slots, jnp.int32), jnp.ones(slots, jnp.float32)
    sampling = RowSampling(real, real, whole, real * 0)
    return SlotSettings(whole, whole, whole, whole.astype(jnp.uint32), whole, sampling, real)


def empty_slots(shape: EngineShape, prefix: Prefilled | None) -> Slots:
    """Slots of which none is active; each begins with the prefix."""
    slots, config = shape.slots, shape.module.config
    texts = slots, shape.max_new_tokens
    cache = KVCache.zeros(config, slots, shape.length, shape.cache_dtype)
    if prefix is not None:

        def begin(empty, rows):
            rows = jnp.broadcast_to(rows, (slots, *rows.shape[1:]))
            return jax.lax.dynamic_update_slice(empty, rows, (0, 0, 0, 0))

        keys, values = jax.tree.map(begin, (cache.keys, cache.values), (prefix.keys, prefix.values))
        cache = cache.replace(keys=keys, values=values)
    return Slots(
        cache=cache,
        settings=empty_settings(slots),
        token=jnp.zeros(slots, jnp.int32),
        active=jnp.zeros(slots, bool),
        count=jnp.zeros(slots, jnp.int32),
        output=jnp.zeros(texts, jnp.int32),
        near_tie=jnp.zeros(texts, bool),
        log_probs=jnp.zeros(texts, jnp.float32) if shape.log_probs else None,
        seen=jnp.zeros((slots, config.vocab_size), bool) if shape.penalize else None,
    )


def prefill(
    shape: EngineShape,
    variables: Mapping[str, Any],
    tokens: jax.Array,
    length: jax.Array,
    prefix: Prefilled | None,
) -> Prefilled:
    """Runs prompts through the model, except for the last token of each.

    Variables are "params", and "lora" where there is an adapter. Tokens are [prompts, length]
    int32, padded on the right, of which `length` [prompts] are run. They go on from the prefix,
    which was run before.
    """
    mask = jnp.arange(tokens.shape[1]) < length[:, None]
    positions, attention, past = token_positions(mask), causal_mask(mask), None
    if prefix is not None:
        before = prefix.tokens.shape[1]
        positions = positions + before
        attention = attention.after(before)
        past = tuple(k.swapaxes(2, 3) for k in prefix.keys), prefix.values
        shared = jnp.broadcast_to(prefix.tokens, (len(tokens), before))
    _, (keys, values) = shape.module.apply(
        variables, tokens, positions, attention, past=past, keep_kv=True
    )
    return Prefilled(
        tuple(k.swapaxes(2, 3).astype(shape.cache_dtype) for k in keys),
        tuple(v.astype(shape.cache_dtype) for v in values),
        tokens if prefix is None else jnp.concatenate([shared, tokens], axis=1),
    )


def insert(slots: Slots, prompts: Prefilled, source: jax.Array, settings: SlotSettings) -> Slots:
    """Gives slots new requests: each continues the row of `prompts` that `source` [slots] says.

    A slot whose source is -1 stays as it is, and its settings are not read.
    """
    new = source >= 0
    order = jnp.argsort(~new, stable=True)
    prefix = prompts.tokens.shape[1] - prompts.values[0].shape[2]

    def copy(i, caches):
        slot = order[i]
        row = source[slot]

        def write(cache, prompt, start):
            rows = jax.lax.dynamic_slice_in_dim(prompt, row, 1)
            return jax.lax.dynamic_update_slice(cache, rows, (slot, 0, *start))

        keys, values = caches
        keys = [write(*pair, (0, prefix)) for pair in zip(keys, prompts.keys, strict=True)]
        values = [write(*pair, (prefix, 0)) for pair in zip(values, prompts.values, strict=True)]
        return tuple(keys), tuple(values)

    caches = (slots.cache.keys, slots.cache.values)
    keys, values = jax.lax.fori_loop(0, jnp.sum(new), copy, caches)
    seen = slots.seen
    if seen is not None:
        position = jnp.arange(prompts.tokens.shape[1])
        tokens = prompts.tokens[jnp.maximum(source, 0)]
        tokens = jnp.where(position < settings.length[:, None], tokens, settings.token[:, None])
        rows = jnp.arange(len(source))[:, None]
        seen = jnp.where(new[:, None], jnp.zeros_like(seen).at[rows, tokens].set(True), seen)
    return slots.replace(
        cache=KVCache(keys, values, jnp.where(new, settings.length, slots.cache.length)),
        settings=jax.tree.map(lambda a, b: jnp.where(new, a, b), settings, slots.settings),
        token=jnp.where(new, settings.token, slots.token),
        active=slots.active | new,
        count=jnp.where(new, 0, slots.count),
        seen=seen,
    )


def decode(
    shape: EngineShape,
    sampler: Callable[..., tuple[jax.Array, jax.Array]],
    variables: Mapping[str, Any],
    slots: Slots,
    cancelled: jax.Array,
    steps: jax.Array,
    enough: jax.Array,
) -> Slots:
    """Samples tokens for all active slots: `steps` at most, until `enough` slots or fewer are left.

    Variables are as of `prefill`, the sampler is `sampling.sample` on the engine's mesh, and slots
    that are `cancelled` [slots] are stopped first.
    """

    def slot_key(stream, sample):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(shape.seed), stream), sample)

    keys = jax.vmap(slot_key)(slots.settings.stream, slots.settings.sample)

    def step(state):
        done, slots = state
        hidden, cache = shape.module.apply(variables, slots.token, slots.cache, method="decode")
        raw = logits = shape.module.apply(variables, hidden, method="logits")
        if slots.seen is not None:
            logits = penalize_repetition(logits, slots.seen, slots.settings.penalty)
        bits = jax.vmap(lambda key, i: jax.random.bits(jax.random.fold_in(key, i)))(
            keys, slots.count
        )
        token, near = sampler(logits, slots.settings.sampling, bits)
        active, count = slots.active, slots.count + slots.active
        here = active[:, None] & (jnp.arange(slots.output.shape[1]) == slots.count[:, None])
        ended = jnp.isin(token, jnp.asarray(shape.eos_ids)) | (count >= slots.settings.limit)
        ended |= token == BROKEN
        log_probs, seen = slots.log_probs, slots.seen
        if log_probs is not None:
            new = log_probability(raw, slots.settings.sampling.temperature, token)
            log_probs = jnp.where(here, new[:, None], log_probs)
        if seen is not None:
            ids = jnp.arange(seen.shape[1])
            seen = seen | (active[:, None] & (ids == token[:, None]))
        return done + 1, slots.replace(
            cache=cache.replace(length=jnp.where(active, cache.length, slots.cache.length)),
            token=jnp.where(active, token, slots.token),
            active=active & ~ended,
            count=count,
            output=jnp.where(here, token[:, None], slots.output),
            near_tie=jnp.where(here, near[:, None], slots.near_tie),
            log_probs=log_probs,
            seen=seen,
        )

    def busy(state):
        done, slots = state
        return (done < steps) & (jnp.sum(slots.active) > enough)

    slots = slots.replace(active=slots.active & ~cancelled)
    return jax.lax.while_loop(busy, step, (0, slots))[1]
