"""Samples many texts at once: prompts are run once, slots are refilled as texts finish."""

import bisect
import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from expandr_jax.errors import UserError
from expandr_jax.generation import slots as device
from expandr_jax.generation.memory import cache_type, check_memory, plan_memory
from expandr_jax.generation.programs import (
    EngineShape,
    heads_axis,
    make_programs,
    prefill_rows,
    unstack_shardings,
    variable_shardings,
)
from expandr_jax.generation.queue import PromptGroup, PromptQueue
from expandr_jax.generation.requests import Completion, Request
from expandr_jax.models.decoder import Decoder, cast_weights, unstack_layers
from expandr_jax.runtime.host_memory import trim_memory
from expandr_jax.sharding import batch_divisor, batch_sharding, device_put_shared


class Engine:
    """Continues prompts with a decoder.

    The same request gives the same text whatever the order, the other requests and the restarts,
    as long as slots, buckets, mesh and weights stay the same. With other slots or another mesh,
    float32 texts are equal up to the first near tie.

    Attributes:
        memory: Bytes on each device, from `plan_memory`.
    """

    def __init__(
        self,
        module: Decoder,
        params: Mapping[str, Any],
        *,
        slots: int,
        prompt_buckets: Sequence[int],
        max_new_tokens: int,
        eos_ids: Sequence[int],
        pad_id: int,
        seed: int,
        prefix: Sequence[int] = (),
        adapter: Mapping[str, Any] | None = None,
        steps_per_call: int = 32,
        cache_dtype: Any = None,
        mesh: Mesh | None = None,
        repetition_penalty: bool = False,
        log_probs: bool = False,
        stop: Sequence[str] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        memory_limit_bytes: int | None = None,
    ):
        """Places the weights, and plans the cache's memory.

        Args:
            module: The decoder; its `lora` settings go with `adapter`.
            params: Base parameters; kept in the decoder's compute type.
            slots: Texts sampled at once.
            prompt_buckets: Lengths in tokens that prompts, without the prefix, are padded to.
            max_new_tokens: Longest text of any request.
            eos_ids: Tokens that end a text.
            pad_id: Fills prompts up; never attended to.
            seed: Seed of all draws.
            prefix: Tokens that every prompt begins with, as of a chat template; they are run once.
            adapter: LoRA tree, or None for the base model.
            steps_per_call: Most tokens a slot between two looks of the host at finished texts.
            cache_dtype: Type of keys and values; None: the compute type, but float32 on CPU,
                where it is quicker.
            mesh: Slots are split over its data and fsdp axes, heads over its tensor axis.
            repetition_penalty: Requests may have one; costs a byte per slot and vocabulary entry.
            log_probs: Completions have the log-probabilities of their tokens.
            stop: Strings that end a text; needs `decode`.
            decode: Token ids to text.
            memory_limit_bytes: Most memory of a device for weights and cache; None: no limit.

        Raises:
            UserError: If a stop string is empty, `slots` does not fit the mesh, or weights and
                cache do not fit the limit.
        """
        self.buckets = tuple(sorted(prompt_buckets))
        self.max_new_tokens, self.slots, self.pad_id = max_new_tokens, slots, pad_id
        self.prefix = tuple(prefix)
        self.steps_per_call, self.repetition_penalty = steps_per_call, repetition_penalty
        self.stop, self.decode = tuple(stop), decode
        if self.stop and decode is None:
            raise ValueError("stop strings need `decode`")
        if "" in self.stop:
            raise UserError("an empty stop string would end every text before it begins")
        if mesh is not None and slots % batch_divisor(mesh):
            raise UserError(
                f"{slots} slots cannot be split over {batch_divisor(mesh)} devices; "
                "expected a multiple"
            )
        self._mesh = mesh
        self._module = module.clone(unroll=True, remat="none")
        self._cache_dtype = jnp.dtype(cache_dtype or cache_type(module))
        self.memory = plan_memory(
            module,
            params,
            slots=slots,
            buckets=self.buckets,
            length=self._length,
            cache_dtype=self._cache_dtype,
            mesh=mesh,
            penalize=repetition_penalty,
        )
        if memory_limit_bytes is not None:
            check_memory(self.memory, memory_limit_bytes)
        self._variables = self._place(params, adapter)
        self._eos_ids = tuple(eos_ids)
        self._idle = jax.device_get(device.empty_settings(slots))
        self._programs = make_programs(
            EngineShape(
                module=self._module,
                slots=slots,
                length=self._length,
                max_new_tokens=max_new_tokens,
                cache_dtype=self._cache_dtype,
                penalize=repetition_penalty,
                log_probs=log_probs,
                seed=seed,
                eos_ids=self._eos_ids,
                mesh=mesh,
                heads_axis=heads_axis(module, mesh),
            )
        )
        self._shared = self._run_prefix()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Samples a text for each request.

        Prompts are run once for all requests that share them, if those come close together.

        Args:
            requests: Read as slots become free.

        Yields:
            Completions in the order in which they finish.

        Raises:
            UserError: If a prompt, a text or a penalty is more than the engine was made for.
        """
        try:
            yield from self._generate(requests)
        finally:  # The cache is gone: the next one must not come on top of it.
            trim_memory()

    def _generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        queue = PromptQueue(map(self._checked, requests), self._bucket, self._prompts)
        ready: collections.deque[tuple[device.Prefilled, int, Request]] = collections.deque()
        running: dict[int, Request] = {}
        slots = self._programs.empty(self._shared)
        if self._mesh is None:  # Bound to the device, as decoded slots: insert compiles once.
            slots = jax.device_put(slots, jax.local_devices()[0])
        cancelled = np.zeros(self.slots, bool)
        while True:
            while len(running) < self.slots and (ready or queue):
                if not ready:
                    ready.extend(self._run_prompts(*queue.take()))
                slots = self._refill(slots, ready, running)
            if not running:
                return
            cancelled[list(running)] = False  # Its text was stopped, but a new one moved in.
            waiting = bool(ready or queue)
            enough = len(running) - 1 - self.slots // 16 if waiting else 0
            slots = self._programs.decode(
                self._variables, slots, cancelled, self.steps_per_call, max(enough, 0)
            )
            cancelled = np.zeros(self.slots, bool)
            active, count = jax.device_get((slots.active, slots.count))
            looked_at = [slot for slot in running if self.stop or not active[slot]]
            if looked_at:
                fetched = slots.output, slots.near_tie, slots.log_probs
                output, near_tie, log_probs = jax.device_get(fetched)
            for slot in looked_at:
                tokens = output[slot, : count[slot]].tolist()
                completion = self._completion(running[slot], tokens, near_tie[slot], active[slot])
                if completion is not None:
                    if log_probs is not None:
                        kept = tuple(log_probs[slot, : len(completion.tokens)].tolist())
                        completion = dataclasses.replace(completion, log_probs=kept)
                    cancelled[slot] = active[slot]
                    del running[slot]
                    yield completion

    def _checked(self, request: Request) -> Request:
        start = len(self.prefix)
        if request.prompt[:start] != self.prefix or len(request.prompt) == start:
            raise UserError(
                f"request {request.id!r}: the prompt does not go on from the engine's prefix of "
                f"{start} tokens"
            )
        if len(request.prompt) - start > self.buckets[-1]:
            raise UserError(
                f"request {request.id!r}: the prompt has {len(request.prompt) - start} tokens"
                f"{' after the prefix' if start else ''}; the largest bucket holds "
                f"{self.buckets[-1]}"
            )
        if request.max_new_tokens > self.max_new_tokens:
            raise UserError(
                f"request {request.id!r}: max_new_tokens is {request.max_new_tokens}; "
                f"the engine was made for {self.max_new_tokens}"
            )
        if request.repetition_penalty != 1 and not self.repetition_penalty:
            raise UserError(
                f"request {request.id!r}: has a repetition penalty; "
                "the engine was made without (repetition_penalty=True)"
            )
        return request

    def _completion(
        self, request: Request, tokens: list[int], near_tie: np.ndarray, active: bool
    ) -> Completion | None:
        """What became of a request, or None if it goes on."""
        reason = "eos" if tokens and tokens[-1] in self._eos_ids else "length"
        text = None
        if self.stop:
            text = self.decode(tokens)
            if any(stop in text for stop in self.stop):
                # The fewest tokens that hold a stop string: the same however often we look.
                count = bisect.bisect_left(range(len(tokens)), True, key=self._stops_by(tokens))
                tokens, reason, active = tokens[:count], "stop", False
                text = self.decode(tokens)
                text = text[: min(text.find(stop) for stop in self.stop if stop in text)]
        if active:
            return None
        places = np.flatnonzero(near_tie[: len(tokens)])
        first = int(places[0]) if len(places) else None
        return Completion(
            request.id, request.sample, tuple(tokens), reason, len(places), first, text
        )

    def _stops_by(self, tokens: list[int]) -> Callable[[int], bool]:
        return lambda count: any(stop in self.decode(tokens[:count]) for stop in self.stop)

    def _run_prompts(
        self, bucket: int, groups: list[PromptGroup]
    ) -> Iterator[tuple[device.Prefilled, int, Request]]:
        tokens = np.full((self._prompts(bucket), bucket), self.pad_id, np.int32)
        length = np.zeros(len(tokens), np.int32)
        for row, group in enumerate(groups):
            own = group.prompt[len(self.prefix) :]
            tokens[row, : len(own)] = own
            length[row] = len(own) - 1
        if self._mesh is not None:  # Each device runs its own prompts.
            tokens, length = jax.device_put((tokens, length), batch_sharding(self._mesh))
        prompts = self._programs.prefill(self._variables, tokens, length, self._shared)
        for row, group in enumerate(groups):
            for request in group.requests:
                yield prompts, row, request

    def _refill(
        self,
        slots: device.Slots,
        ready: collections.deque[tuple[device.Prefilled, int, Request]],
        running: dict[int, Request],
    ) -> device.Slots:
        """Moves requests of one batch of prompts into free slots."""
        source = np.full(self.slots, -1, np.int32)
        settings = jax.tree.map(np.array, self._idle)
        prompts = ready[0][0]
        for slot in range(self.slots):
            if slot in running or not ready or ready[0][0] is not prompts:
                continue
            _, source[slot], request = ready.popleft()
            running[slot] = request
            settings.token[slot] = request.prompt[-1]
            settings.length[slot] = len(request.prompt) - 1
            settings.limit[slot] = request.max_new_tokens
            settings.stream[slot] = request.stream
            settings.sample[slot] = request.sample
            settings.penalty[slot] = request.repetition_penalty
            settings.sampling.temperature[slot] = request.temperature
            settings.sampling.top_p[slot] = request.top_p
            settings.sampling.top_k[slot] = request.top_k
            settings.sampling.min_p[slot] = request.min_p
        return self._programs.insert(slots, prompts, source, settings)

    def _bucket(self, prompt: Sequence[int]) -> int:
        return self.buckets[bisect.bisect_left(self.buckets, len(prompt) - len(self.prefix))]

    def _prompts(self, bucket: int) -> int:
        """Prompts of this length that are run together."""
        return prefill_rows(self.slots, bucket, self._mesh)

    @property
    def _length(self) -> int:
        """Tokens that a slot has room for."""
        return len(self.prefix) + self.buckets[-1] + self.max_new_tokens

    def _place(
        self, params: Mapping[str, Any], adapter: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """Weights in the compute type, except norms, and the adapter: on the mesh, unstacked."""
        variables = {"params": cast_weights(params, self._module.dtype)}
        if adapter is not None:
            variables["lora"] = adapter
        places = None
        if self._mesh is not None:
            places = variable_shardings(self._mesh, self._module, params, adapter)
        placed = {}
        for name, tree in variables.items():
            if jax.default_backend() == "cpu":
                # Layers of an array of numpy are views of it: the weights are in memory once.
                tree = jax.tree.map(np.asarray, tree)
            elif places is not None:
                # Spread first: parameters may come from a mesh of another shape, as training has.
                tree = jax.device_put(tree, places[name])
            where = SingleDeviceSharding(jax.local_devices()[0])
            if places is not None:
                where = unstack_shardings(places[name], self._module.config.num_layers)
            placed[name] = device_put_shared(unstack_layers(tree), where)
        return placed

    def _run_prefix(self) -> device.Prefilled | None:
        if not self.prefix:
            return None
        tokens = np.asarray([self.prefix], np.int32)
        length = np.asarray([len(self.prefix)], np.int32)
        return self._programs.prefill(self._variables, tokens, length, None)
