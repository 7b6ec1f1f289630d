"""The one way to sample texts: on this process's devices, or on a server that a config names."""

import bisect
import dataclasses
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Completion, Extent, Request
from expandr_jax.generation.server import ServerEngine
from expandr_jax.generation.settings import GeneratorSettings
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
    settings: GeneratorSettings
    seed: int
    processes: Processes
    reporter: Reporter
    server_cache: pathlib.Path | None = None
    log_probs: bool = False
    held: Any = None

    def generate(
        self, adapter: Any | None, requests: Iterable[Request], left: Iterable[Request]
    ) -> Iterator[tuple[Completion, str]]:
        """Samples some of a stage's requests; all processes of the run call it together.

        Args:
            adapter: LoRA tree, or None for the base model.
            requests: All of the stage that are this process's, with ids or a user's message as
                prompt; those of one message follow one another. Slots have room for the longest of
                all processes; what a restart finds done counts too, so that their size, and with it
                every rounding, stays the same. They are looked at once, and none is kept.
            left: Those that are to be sampled here, from among `requests`; read as slots become
                free.

        Yields:
            Completions in the order in which they finish, each with its text.

        Raises:
            UserError: A request asks for what the engine cannot do, the memory does not suffice,
                or the server fails or would have to sample with the adapter.
        """
        limit, cut = max(self.settings.prompt_buckets), 0

        def measured() -> Iterator[Request]:
            nonlocal cut
            for request, was_cut in self._prompted(requests, limit):
                cut += was_cut
                yield request

        extent = Extent.of(measured())
        if cut := sum(self.processes.gather(cut)):
            self.reporter.say(f"{cut} prompts lost their beginning (over {limit} tokens)")
        engine = self.engine(adapter, self.of_all(extent))
        refused = set()
        for completion in engine.generate(request for request, _ in self._prompted(left, limit)):
            if completion.finished == "refused":
                refused.add(completion.id)
            yield completion, self.text(completion)
        if refused:
            self.reporter.say(
                f"{len(refused)} prompts are too long for the server; their texts are empty"
            )

    def text(self, completion: Completion) -> str:
        """The text of a completion."""
        text = completion.text
        text = self.generator.decode(completion.tokens) if text is None else text
        # The mark belongs to the text, by which a thought is told from an answer.
        return f"<think>{text}" if self.generator.opens_thought else text

    def _prompted(self, requests: Iterable[Request], limit: int) -> Iterator[tuple[Request, bool]]:
        """Requests with ids as prompts, and whether these were cut; a message is turned once."""
        message, ids, cut = None, (), False
        for request in requests:
            if isinstance(request.prompt, str):
                if request.prompt != message:
                    message = request.prompt
                    ids, cut = self.generator.chat_ids(message, limit)
                    ids = tuple(ids)
                yield dataclasses.replace(request, prompt=ids), cut
            else:
                yield request, False

    def of_all(self, own: Extent) -> Extent:
        """The extent of the requests of all processes, which call it together."""
        several = self.processes.gather(dataclasses.asdict(own))
        return Extent.joined(
            Extent(**{**extent, "ends": tuple(map(tuple, extent["ends"]))}) for extent in several
        )

    def engine(self, adapter: Any | None, extent: Extent) -> Engine | ServerEngine:
        """The engine for requests of all processes; the rest is as of `generate`."""
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
        prefix = extent.prefix
        longest = extent.longest - len(prefix)
        room = extent.longest + extent.most
        made_for = self.generator.module.config.max_positions
        if room > made_for:
            self.reporter.say(
                f"prompts and texts may have {room} tokens together; the generator was made for "
                f"{made_for}"
            )
        return self.engine_here(
            adapter=adapter,
            slots=slots_of_a_process(settings, self.mesh, extent.count),
            prompt_buckets=buckets[: bisect.bisect_left(buckets, longest) + 1],
            max_new_tokens=extent.most,
            prefix=prefix,
            repetition_penalty=extent.penalty,
        )

    def engine_here(self, **options: Any) -> Engine:
        """An engine on this process's devices; options are those that differ between engines.

        Raises:
            UserError: As `Engine`.
        """
        generator, settings = self.generator, self.settings
        return Engine(
            generator.module,
            self.params,
            eos_ids=generator.eos_ids,
            pad_id=generator.pad_id,
            seed=self.seed,
            mesh=self.mesh,
            log_probs=self.log_probs,
            stop=settings.stop,
            decode=generator.decode,
            memory_limit_bytes=sampling_memory(settings),
            held=self.held,
            **options,
        )

    def fits(self, message: str) -> bool:
        """Whether a user's message loses nothing as a prompt."""
        return not self.generator.chat_ids(message, max(self.settings.prompt_buckets))[1]


def sampling_memory(settings: GeneratorSettings) -> int:
    """Bytes of each device that sampling may take, by the config's section `generator`."""
    if settings.memory_limit:
        return int(settings.memory_limit * 2**30)
    stats = jax.local_devices()[0].memory_stats() or {}
    # Devices of a processor have the host's memory between them.
    return stats.get("bytes_limit") or psutil.virtual_memory().total // jax.local_device_count()


def slots_of_a_process(
    settings: GeneratorSettings, mesh: Mesh, texts: int | None = None, processes: int | None = None
) -> int:
    """Slots of a stage in each process; halved while all of its texts fit, so a small one is quick.

    Args:
        settings: The config's section `generator`, whose slots all processes have together.
        mesh: The process's own.
        texts: Number of texts of all processes together; None: so many that no slot is spared.
        processes: How many there are; None: jax's.

    Raises:
        UserError: The slots cannot be divided among the processes and their devices.
    """
    slots, count = settings.slots, processes or jax.process_count()
    divisor = count * batch_divisor(mesh)
    if slots % divisor:
        raise UserError(
            f"generator.slots {slots} must be a multiple of {divisor} (the data and fsdp of "
            f"sampling's mesh{', in each process' if count > 1 else ''})"
        )
    while texts is not None and slots // 2 >= texts and slots % (2 * divisor) == 0:
        slots //= 2
    return slots // count
