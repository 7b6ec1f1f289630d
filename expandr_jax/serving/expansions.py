"""Expansions of queries by a trained generator, in slots that are compiled once and kept."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from expandr_jax.expansion.expand import Expander, by_sample
from expandr_jax.expansion.prompts import strip_lead_in
from expandr_jax.expansion.settings import ExpansionSettings
from expandr_jax.expansion.strategies import Ask
from expandr_jax.files.records import hash_json
from expandr_jax.generation.engine import Engine
from expandr_jax.generation.requests import Request, Requests
from expandr_jax.generation.sampler import Sampler
from expandr_jax.serving.cache import Cache, Expansion
from expandr_jax.sharding import batch_divisor


class SlotSampler:
    """Samples with engines that stay: one of few slots for a single text, and one of many.

    Args:
        sampler: The generator and how it samples.
        settings: The config's section `expansion`.
        slots: How many the larger engine has, about: a multiple of the devices'.
    """

    def __init__(self, sampler: Sampler, settings: ExpansionSettings, slots: int):
        self.sampler, self._settings = sampler, settings
        divisor = batch_divisor(sampler.mesh)
        most = -(-slots // divisor) * divisor
        self._engines = [self._engine(count) for count in sorted({divisor, most})]
        self._ready: list[Engine] = []  # Engines whose programs are compiled.

    @property
    def slots(self) -> int:
        """Texts that are sampled at once, at most."""
        return self._engines[-1].shape.slots

    def compile(self, engines: int | None = None) -> None:
        """Samples a little in all shapes of the first so many engines, or of all.

        No request waits for a program then, and the larger engines are not asked before.
        """
        pad = self.sampler.generator.pad_id
        for engine in self._engines[len(self._ready) : engines]:
            for bucket in self.sampler.settings.prompt_buckets:
                list(engine.generate([Request("", 0, (pad,) * bucket, 0.0, 1.0, 2)]))
            self._ready.append(engine)

    def texts(self, requests: Requests) -> dict[tuple[str, int], str]:
        """(Request's id, sample) -> text, without its lead-in."""
        asked = [self._prompted(request) for request in requests]
        engines = self._ready or self._engines[:1]
        engine = next((e for e in engines if e.shape.slots >= len(asked)), engines[-1])
        return {
            (done.id, done.sample): strip_lead_in(self.sampler.text(done)).strip()
            for done in engine.generate(asked)
        }

    def _prompted(self, request: Request) -> Request:
        limit = max(self.sampler.settings.prompt_buckets)
        ids, _ = self.sampler.generator.chat_ids(request.prompt, limit)
        return dataclasses.replace(request, prompt=tuple(ids))

    def _engine(self, slots: int) -> Engine:
        return self.sampler.engine_here(
            slots=slots,
            prompt_buckets=self.sampler.settings.prompt_buckets,
            max_new_tokens=self._settings.max_new_tokens,
            repetition_penalty=self._settings.repetition_penalty != 1,
        )


class ServedExpansions:
    """Expands queries by a run's strategy, or finds what was written for them before.

    Args:
        expander: The strategy; its settings say how texts are drawn.
        slots: What samples them.
        samples: How often each `Ask` is answered.
        encode: Passages to their vectors [count, dim].
        content: A hash of all that those, and steps that search, depend on.
        cache: Where they are kept; None: nowhere.
    """

    def __init__(
        self,
        expander: Expander,
        slots: SlotSampler,
        samples: int,
        encode: Callable[[Sequence[str]], np.ndarray],
        content: str,
        cache: Cache | None = None,
    ):
        self._expander, self._slots, self._samples = expander, slots, samples
        self._encode, self._cache = encode, cache
        self._content = [*_sampled_by(expander, slots.sampler), samples, content]
        self._making = threading.Lock()

    @property
    def at_once(self) -> int:
        """Queries that are best made together."""
        return max(1, self._slots.slots // self._samples)

    def compile(self, engines: int | None = None) -> None:
        """Warms the engines up, as `SlotSampler` does."""
        self._slots.compile(engines)

    @property
    def texts(self) -> int:
        """Passages of a query."""
        return self._samples * len(self._expander.strategy.asks)

    def find(self, query: str) -> Expansion | None:
        """The kept expansion of a query, or None."""
        return None if self._cache is None else self._cache.get(self._key(query))

    def make(self, queries: Sequence[str]) -> list[Expansion]:
        """Writes passages for several queries, and keeps them; those asked twice are made once.

        Those that were made and kept while these waited for their turn are not made again.
        """
        made = {query: kept for query in queries if (kept := self.find(query)) is not None}
        if new := [query for query in queries if query not in made]:
            passages = self.written(new)
            vectors = self._encode([text for several in passages.values() for text in several])
            start = 0
            for query, several in passages.items():
                end = start + len(several)
                made[query] = Expansion(tuple(several), vectors[start:end])
                start = end
                if self._cache is not None:
                    self._cache.put(self._key(query), query, made[query])
        return [made[query] for query in queries]

    def written(self, queries: Sequence[str]) -> dict[str, list[str]]:
        """Query -> the passages that are written for it now."""
        distinct = {query: query for query in queries}
        with self._making:
            texts = self._expander.texts(distinct, self._samples, self._sample)
            return {query: by_sample(texts[query]) for query in distinct}

    def _sample(self, step: Ask, requests: Requests) -> dict[tuple[str, int], str]:
        # The query's name sets its last texts apart, as it always has.
        apart = "" if step is self._expander.strategy.asks[-1] else f"{step.name}/"
        named = [dataclasses.replace(r, id=f"{apart}{r.id}") for r in requests]
        made = self._slots.texts(named)
        return {(name.removeprefix(apart), sample): text for (name, sample), text in made.items()}

    def _key(self, query: str) -> str:
        return hash_json([*self._content, query])


def _sampled_by(expander: Expander, sampler: Sampler) -> list[Any]:
    """What texts depend on beside the query, its documents and the sample, as JSON."""
    settings, own = expander.settings, sampler.settings
    asks = [
        [ask.name, ask.message("query", ["passage"], expander.most_characters, lambda _: True)]
        for ask in expander.strategy.steps
        if isinstance(ask, Ask)
    ]
    drawn = [
        settings.temperature, settings.top_p, settings.top_k, settings.min_p,
        settings.repetition_penalty, settings.max_new_tokens,
    ]  # fmt: skip
    model = [sampler.weights_hash, sampler.generator.identity, str(sampler.generator.today)]
    limits = [list(own.prompt_buckets), list(own.stop), expander.most_characters]
    return [model, limits, sampler.seed, asks, settings.strategy, settings.template, drawn]
