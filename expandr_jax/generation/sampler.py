"""The one way to sample texts: on this process's devices, or on a server that a config names."""

import bisect
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Completion, Request, common_prefix
from expandr_jax.generation.server import ServerEngine
from expandr_jax.models.generator import Generator
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.sharding import batch_divisor


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Makes the engine that a set of requests needs, and samples them with it.

    Attributes:
        generator: The language model.
        params: Its base weights, as this process can read them all.
        weights_hash: sha256 of the base weights, by which kept texts are told apart.
        mesh: The devices of this process that sample.
        settings: The config's section `generator`.
        seed: Seed of all draws.
        processes: Those of the run, which have the slots of `settings` together.
        reporter: Where people are told what was cut or is too long.
        server_cache: Where the texts of a server are kept; None: texts are sampled here even where
            `settings` name a server.
        log_probs: Whether completions have the log-probabilities of their tokens; a server's never
            do.
        held: The base weights as they stay on the devices meanwhile; None: `params`.
    """

    generator: Generator
    params: Any
    weights_hash: str
    mesh: Mesh
    settings: Any
    seed: int
    processes: Processes
    reporter: Reporter
    server_cache: pathlib.Path | None = None
    log_probs: bool = False
    held: Any = None

    def generate(
        self, adapter: Any | None, requests: Sequence[Request], left: Sequence[Request]
    ) -> Iterator[tuple[Completion, str]]:
        """Samples some of a stage's requests.

        Args:
            adapter: LoRA tree, or None for the base model.
            requests: All of the stage, in all processes, with ids or a user's message as prompt.
                Slots have room for the longest; what a restart finds done counts too, so that
                their size, and with it every rounding, stays the same.
            left: Those that are to be sampled here, from among `requests`.

        Yields:
            Completions in the order in which they finish, each with its text.

        Raises:
            UserError: A request asks for what the engine cannot do, the memory does not suffice,
                or the server fails or would have to sample with the adapter.
        """
        limit = max(self.settings.prompt_buckets)
        prompts = {request.prompt: (request.prompt, False) for request in requests}
        for message in prompts:
            if isinstance(message, str):
                ids, cut = self.generator.chat_ids(message, limit)
                prompts[message] = tuple(ids), cut
        if cut := sum(prompts[request.prompt][1] for request in requests):
            self.reporter.say(f"{cut} prompts lost their beginning (over {limit} tokens)")
        requests, left = (
            [dataclasses.replace(request, prompt=prompts[request.prompt][0]) for request in several]
            for several in (requests, left)
        )
        refused = set()
        for completion in self.engine(adapter, requests).generate(left):
            if completion.finished == "refused":
                refused.add(completion.id)
            text = completion.text
            text = self.generator.decode(completion.tokens) if text is None else text
            # The mark belongs to the text, by which a thought is told from an answer.
            yield completion, f"<think>{text}" if self.generator.opens_thought else text
        if refused:
            self.reporter.say(
                f"{len(refused)} prompts are too long for the server; their texts are empty"
            )

    def engine(self, adapter: Any | None, requests: Sequence[Request]) -> Engine | ServerEngine:
        """The engine for requests whose prompts are ids; arguments and errors as of `generate`."""
        settings, buckets = self.settings, self.settings.prompt_buckets
        if self.server_cache and settings.server.url:
            if adapter is not None:
                raise UserError(
                    "generator.server.url is set, but the server has the base model only and "
                    "cannot sample with the trained adapter; leave the URL empty for this run"
                )
            tokenizer = self.generator.tokenizer
            return ServerEngine(
                **vars(settings.server),
                encode=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
                seed=self.seed,
                cache=self.server_cache,
                stop=settings.stop,
            )
        prompts = [request.prompt for request in requests]
        prefix = common_prefix(prompts)
        longest = max(map(len, prompts), default=1) - len(prefix)
        most = max((request.max_new_tokens for request in requests), default=1)
        room = len(prefix) + longest + most
        made_for = self.generator.module.config.max_positions
        if room > made_for:
            self.reporter.say(
                f"prompts and texts may have {room} tokens together; the generator was made for "
                f"{made_for}"
            )
        return Engine(
            self.generator.module,
            self.params,
            adapter=adapter,
            slots=slots_of_a_process(settings, self.mesh, len(requests)),
            prompt_buckets=buckets[: bisect.bisect_left(buckets, longest) + 1],
            max_new_tokens=most,
            eos_ids=self.generator.eos_ids,
            pad_id=self.generator.pad_id,
            seed=self.seed,
            prefix=prefix,
            mesh=self.mesh,
            repetition_penalty=any(request.repetition_penalty != 1 for request in requests),
            log_probs=self.log_probs,
            stop=settings.stop,
            decode=self.generator.decode,
            memory_limit_bytes=sampling_memory(settings),
            held=self.held,
        )

    def fits(self, message: str) -> bool:
        """Whether a user's message loses nothing as a prompt."""
        return not self.generator.chat_ids(message, max(self.settings.prompt_buckets))[1]


def sampling_memory(settings: Any) -> int:
    """Bytes of each device that sampling may take, by the config's section `generator`."""
    if settings.memory_limit:
        return int(settings.memory_limit * 2**30)
    stats = jax.local_devices()[0].memory_stats() or {}
    # Devices of a processor have the host's memory between them.
    return stats.get("bytes_limit") or psutil.virtual_memory().total // jax.local_device_count()


def slots_of_a_process(settings: Any, mesh: Mesh, texts: int | None = None) -> int:
    """Slots of a stage in each process; halved while all of its texts fit, so a small one is quick.

    Args:
        settings: The config's section `generator`, whose slots all processes have together.
        mesh: The process's own.
        texts: Number of texts of all processes together; None: so many that no slot is spared.

    Raises:
        UserError: The slots cannot be divided among the processes and their devices.
    """
    slots, count = settings.slots, jax.process_count()
    divisor = count * batch_divisor(mesh)
    if slots % divisor:
        raise UserError(
            f"generator.slots {slots} must be a multiple of {divisor} (the data and fsdp of "
            f"sampling's mesh{', in each process' if count > 1 else ''})"
        )
    while texts is not None and slots // 2 >= texts and slots % (2 * divisor) == 0:
        slots //= 2
    return slots // count
