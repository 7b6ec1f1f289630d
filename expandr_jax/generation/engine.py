"""Samples many texts at once: prompts are run once, slots are refilled as texts finish."""

import bisect
import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.generation import slots as device
from expandr_jax.generation.memory import check_memory, plan_memory
from expandr_jax.generation.programs import (
    make_programs,
    unstack_shardings,
    variable_shardings,
)
from expandr_jax.generation.queue import prompt_batches
from expandr_jax.generation.requests import Completion, Request
from expandr_jax.generation.sampling import BROKEN
from expandr_jax.models.decoder import Decoder, cast_weights, unstack_layers
from expandr_jax.runtime.host_memory import trim_memory
from expandr_jax.sharding import batch_divisor, batch_sharding, device_put_shared, make_mesh


class Engine:
    """Continues prompts with a decoder.

    The same request gives the same text whatever the order, the other requests and the restarts,
    as long as slots, buckets, mesh and weights stay the same. With other slots or another mesh,
    float32 texts are equal up to the first near tie.

    Attributes:
        shape: What its programs are compiled for.
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
        mesh: Mesh | None = None,
        repetition_penalty: bool = False,
        log_probs: bool = False,
        stop: Sequence[str] = (),
        decode: Callable[[Sequence[int]], str] | None = None,
        memory_limit_bytes: int | None = None,
        held: Mapping[str, Any] | None = None,
    ):
        """Plans the cache's memory, and transfers the weights to the devices.

        Args:
            module: The decoder; its `lora` settings go with `adapter`.
            params: Base parameters; kept in the decoder's compute type.
            slots: As `EngineShape` has it, and so `max_new_tokens`, `eos_ids`, `seed` and
                `log_probs`.
            prompt_buckets: Lengths in tokens that prompts, without the prefix, are padded to.
            pad_id: Fills prompts up; never attended to.
            prefix: Tokens that every prompt begins with, as of a chat template; they are run once.
            adapter: LoRA tree, or None for the base model.
            steps_per_call: Most tokens a slot between two looks of the host at finished texts.
            mesh: Slots are split over its data and fsdp axes, heads over its tensor axis; None:
                one device.
            repetition_penalty: Requests may have one.
            stop: Strings that end a text; needs `decode`.
            decode: Token ids to text.
            memory_limit_bytes: Most memory of a device for weights and cache; None: no limit.
            held: The base as it stays on the devices meanwhile; None: `params`.

        Raises:
            UserError: If a stop string is empty, `slots` does not fit the mesh, or weights and
                cache do not fit the limit.
        """
        if stop and decode is None:
            raise ValueError("stop strings need `decode`")
        if "" in stop:
            raise UserError("an empty stop string would end every text before it begins")
        if mesh is None:
            mesh = make_mesh(devices=jax.local_devices()[:1])
        if slots % batch_divisor(mesh):
            raise UserError(
                f"{slots} slots cannot be split over {batch_divisor(mesh)} devices; "
                "expected a multiple"
            )
        self._buckets, self._prefix = tuple(sorted(prompt_buckets)), tuple(prefix)
        self._pad_id, self._steps_per_call = pad_id, steps_per_call
        self._stop, self._decode = tuple(stop), decode
        self.shape = device.EngineShape(
            module=module.clone(unroll=True, remat="none"),
            slots=slots,
            length=len(prefix) + self._buckets[-1] + max_new_tokens,
            max_new_tokens=max_new_tokens,
            seed=seed,
            eos_ids=tuple(eos_ids),
            mesh=mesh,
            penalize=repetition_penalty,
            log_probs=log_probs,
        )
        self.memory = plan_memory(self.shape, params, self._buckets, held)
        if memory_limit_bytes is not None:
            check_memory(self.memory, memory_limit_bytes)
        self._shardings = variable_shardings(mesh, self.shape.module, params, adapter)
        variables = {"params": params} if adapter is None else {"params": params, "lora": adapter}
        self._variables = self._device_put(variables)
        self._idle = jax.device_get(device.empty_settings(slots))
        self._programs = make_programs(self.shape)
        self._shared = self._run_prefix()

    def use(self, adapter: Mapping[str, Any]) -> None:
        """Replaces the adapter by another of the same shapes.

        The base stays where it is, and nothing is compiled: the prefix alone is run again.
        """
        self._variables = self._variables | self._device_put({"lora": adapter})
        self._shared = self._run_prefix()

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Samples a text for each request.

        Prompts are run once for all requests that share them, if those come close together.

        Args:
            requests: Read as slots become free.

        Yields:
            Completions in the order in which they finish.

        Raises:
            UserError: If a prompt, a text or a penalty is more than the engine was made for, or
                the model has no token to give (NotFiniteError).
        """
        try:
            yield from self._generate(requests)
        finally:  # The cache is gone: the next one must not come on top of it.
            trim_memory()

    def _generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        batches = prompt_batches(
            map(self._checked, requests), self._bucket, self.shape.prefill_rows
        )
        batch = next(batches, None)
        ready: collections.deque[tuple[device.Prefilled, int, Request]] = collections.deque()
        running: dict[int, Request] = {}
        slots = self._programs.empty(self._shared)
        cancelled = np.zeros(self.shape.slots, bool)
        while True:
            while len(running) < self.shape.slots and (ready or batch):
                if not ready:
                    ready.extend(self._run_prompts(*batch))
                    batch = next(batches, None)
                slots = self._refill(slots, ready, running)
            if not running:
                return
            cancelled[list(running)] = False  # A new text may be in a slot whose text was stopped.
            enough = len(running) - 1 - self.shape.slots // 16 if ready or batch else 0
            slots = self._programs.decode(
                self._variables, slots, cancelled, self._steps_per_call, max(enough, 0)
            )
            cancelled = np.zeros(self.shape.slots, bool)
            active, count = jax.device_get((slots.active, slots.count))
            looked_at = [slot for slot in running if self._stop or not active[slot]]
            if looked_at:
                fetched = jax.device_get((slots.output, slots.near_tie, slots.log_probs))
            for slot in looked_at:
                # Tokens, whether each was a near tie, and log-probabilities if they are wanted.
                sampled = (None if x is None else x[slot, : count[slot]].tolist() for x in fetched)
                completion = self._completion(running[slot], active[slot], *sampled)
                if completion is not None:
                    cancelled[slot] = active[slot]
                    del running[slot]
                    yield completion

    def _checked(self, request: Request) -> Request:
        start, most = len(self._prefix), self.shape.max_new_tokens
        own, problem = len(request.prompt) - start, None
        if request.prompt[:start] != self._prefix or not own:
            problem = f"the prompt does not go on from the engine's prefix of {start} tokens"
        elif own > self._buckets[-1]:
            problem = (
                f"the prompt has {own} tokens{' after the prefix' if start else ''}; the largest "
                f"bucket holds {self._buckets[-1]}"
            )
        elif request.max_new_tokens > most:
            problem = f"max_new_tokens is {request.max_new_tokens}; the engine was made for {most}"
        elif request.repetition_penalty != 1 and not self.shape.penalize:
            problem = (
                "has a repetition penalty; the engine was made without (repetition_penalty=True)"
            )
        if problem:
            raise UserError(f"request {request.id!r}: {problem}")
        return request

    def _completion(
        self,
        request: Request,
        active: bool,
        tokens: list[int],
        near_tie: list[bool],
        log_probs: list[float] | None,
    ) -> Completion | None:
        """The finished text of a request; None if it is not finished."""
        if tokens and tokens[-1] == BROKEN:
            raise NotFiniteError(
                f"request {request.id!r}: the generator's logits are not finite after "
                f"{len(tokens) - 1} tokens of the text; its weights, or the adapter's, are damaged"
            )
        reason = "eos" if tokens and tokens[-1] in self.shape.eos_ids else "length"
        text = None
        if self._stop:
            text = self._decode(tokens)
            if self._stops(text):
                # The fewest tokens that hold a stop string: the same however often we look.
                count = bisect.bisect_left(
                    range(len(tokens)), True, key=lambda n: self._stops(self._decode(tokens[:n]))
                )
                tokens, reason, active = tokens[:count], "stop", False
                text = self._decode(tokens)
                text = text[: min(text.find(stop) for stop in self._stop if stop in text)]
        if active:
            return None
        ties = [i for i, near in enumerate(near_tie[: len(tokens)]) if near]
        return Completion(
            request.id, request.sample, tuple(tokens), reason, len(ties), next(iter(ties), None),
            text, None if log_probs is None else tuple(log_probs[: len(tokens)]),
        )  # fmt: skip

    def _stops(self, text: str) -> bool:
        return any(stop in text for stop in self._stop)

    def _run_prompts(
        self, bucket: int, groups: list[list[Request]]
    ) -> Iterator[tuple[device.Prefilled, int, Request]]:
        tokens = np.full((self.shape.prefill_rows(bucket), bucket), self._pad_id, np.int32)
        length = np.zeros(len(tokens), np.int32)
        for row, group in enumerate(groups):
            own = group[0].prompt[len(self._prefix) :]
            tokens[row, : len(own)] = own
            length[row] = len(own) - 1
        # Each device runs its own prompts.
        tokens, length = jax.device_put((tokens, length), batch_sharding(self.shape.mesh))
        prompts = self._programs.prefill(self._variables, tokens, length, self._shared)
        for row, group in enumerate(groups):
            for request in group:
                yield prompts, row, request

    def _refill(
        self,
        slots: device.Slots,
        ready: collections.deque[tuple[device.Prefilled, int, Request]],
        running: dict[int, Request],
    ) -> device.Slots:
        """Moves requests of one batch of prompts into free slots."""
        source = np.full(self.shape.slots, -1, np.int32)
        settings = jax.tree.map(np.array, self._idle)
        prompts = ready[0][0]
        for slot in range(self.shape.slots):
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
        return self._buckets[bisect.bisect_left(self._buckets, len(prompt) - len(self._prefix))]

    def _device_put(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Weights in the compute type, except norms, and the adapter: on the mesh, unstacked."""
        module, on_cpu = self.shape.module, jax.default_backend() == "cpu"
        shardings, on_devices = traverse_util.flatten_dict(self._shardings), {}
        # One by one: of no other is there a stacked copy on this mesh beside its layers.
        for path, leaf in traverse_util.flatten_dict(variables).items():
            collection, first, *rest = path
            if collection == "params":
                leaf = cast_weights({path[-1]: leaf}, module.dtype)[path[-1]]
            # Layers of an array of numpy are views of it: there the weights are in memory once.
            # Else spread first: they may come from a mesh of another shape, as training has.
            leaf = np.asarray(leaf) if on_cpu else jax.device_put(leaf, shardings[path])
            tree, own = {first: leaf}, {first: shardings[path]}
            if first == "layers":
                own = unstack_shardings(own, module.config.num_layers)
                tree = unstack_layers(tree)
            for name, value in jax.block_until_ready(device_put_shared(tree, own)).items():
                on_devices[collection, name, *rest] = value
        return traverse_util.unflatten_dict(on_devices)

    def _run_prefix(self) -> device.Prefilled | None:
        if not self._prefix:
            return None
        tokens = np.asarray([self._prefix], np.int32)
        length = np.asarray([len(self._prefix)], np.int32)
        return self._programs.prefill(self._variables, tokens, length, None)
