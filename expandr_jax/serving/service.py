"""Answers questions with a pair: queues in front of its models, deadlines, and what is refused."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Sequence

from expandr_jax.serving.batching import Batcher, Busy
from expandr_jax.serving.cache import Expansion
from expandr_jax.serving.documents import Hit, LiveDocuments
from expandr_jax.serving.expansions import ServedExpansions
from expandr_jax.serving.pair import Answered, Asked, Pair
from expandr_jax.serving.prometheus import ServiceMetrics

MODES = ("plain", "distilled", "expanded", "auto")
SEARCHES_AT_ONCE = 16  # Searches that are encoded together.
WRITERS = 1  # Writes of documents that are encoded at once.


class Refused(Exception):
    """A request that is not answered.

    Attributes:
        status: HTTP's number.
        reason: One word.
        retry: Seconds after which it may be tried again; None: it would be refused again.
    """

    def __init__(self, status: int, reason: str, message: str, retry: int | None = None):
        super().__init__(message)
        self.status, self.reason, self.retry = status, reason, retry


@dataclasses.dataclass(frozen=True)
class Limits:
    """How many requests may wait before more are refused.

    Attributes:
        searches: Searches.
        expansions: Queries whose passages are not written yet.
        writes: Writes of documents.
    """

    searches: int = 256
    expansions: int = 64
    writes: int = 16


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer to a query.

    Attributes:
        hits: The documents, the best first.
        mode: How they were found, never "auto": "plain" where the passage was late.
        late: Whether it was.
        expansion: What the query was expanded by, if it was.
        seconds: Step -> what it took.
    """

    hits: list[Hit]
    mode: str
    late: bool
    expansion: Expansion | None
    seconds: dict[str, float]


class Service:
    """Searches, expands and writes for many at once; models come when they are loaded.

    Args:
        metrics: Where answers are counted.
        limits: What is refused.
        expands: Whether a generator comes at all.
    """

    def __init__(self, metrics: ServiceMetrics, limits: Limits = Limits(), expands: bool = True):
        self.metrics, self.limits, self.expands = metrics, limits, expands
        self.documents: LiveDocuments | None = None
        self._pair: Pair | None = None
        self._expansions: ServedExpansions | None = None
        self._searches: Batcher | None = None
        self._passages: Batcher | None = None
        self._writers = concurrent.futures.ThreadPoolExecutor(WRITERS, "writer")
        self._writes = 0
        for mode in MODES:
            metrics.watch(metrics.ready.labels(mode), lambda mode=mode: self.is_ready(mode))

    def begin(self, pair: Pair, documents: LiveDocuments) -> None:
        """Starts to answer, without expansions."""
        self._pair, self.documents = pair, documents
        self._searches = Batcher(self._search, SEARCHES_AT_ONCE, self.limits.searches, "search")
        own = self.metrics
        own.watch(own.documents, lambda: len(documents))
        own.watch(own.writes, lambda: documents.writes)
        own.watch(own.waiting.labels("search"), lambda: len(self._searches))

    def begin_expanding(self, expansions: ServedExpansions) -> None:
        """Starts to answer with expansions, too."""
        self._expansions, most = expansions, self.limits.expansions
        self._passages = Batcher(self._expand, expansions.at_once, most, "expand")
        own = self.metrics
        own.watch(own.waiting.labels("expand"), lambda: len(self._passages))

    def is_ready(self, mode: str) -> bool:
        """Whether a mode answers by now; some never do."""
        if mode == "expanded":
            return self._passages is not None
        if mode == "distilled":
            return self._pair is not None and self._pair.distilled is not None
        if mode == "auto":
            gate = None if self._pair is None else self._pair.gate
            return gate is not None and gate.is_ready and self._passages is not None
        return mode == "plain" and self._searches is not None

    async def search(
        self, query: str, k: int, mode: str, timeout: float, among: Sequence[str] | None = None
    ) -> Answer:
        """Finds documents.

        Args:
            query: What for.
            k: How many.
            mode: One of `MODES`.
            timeout: Seconds after which the query goes without a passage.
            among: Ids to which the results are limited.

        Raises:
            Refused: The run lacks what the mode wants, or there are too many requests.
        """
        start = time.perf_counter()
        self._check(mode)
        asked = Asked(query, k, None, None if among is None else tuple(among))
        seconds: collections.Counter[str] = collections.Counter()
        expansion, late = None, False
        if mode == "auto":
            found = await self._found(dataclasses.replace(asked, gated=True), seconds)
            seconds["gate"] = found.gate_seconds
            mode = "expanded" if found.expands else "plain"
            self.metrics.gated.labels(mode).inc()
        if mode == "expanded":
            began = time.perf_counter()
            expansion = await self._expansion(query, timeout)
            seconds["expand"] = time.perf_counter() - began
            late = expansion is None
        if not ("gate" in seconds and expansion is None):  # What the gate saw is the answer else.
            asked = dataclasses.replace(asked, expansion=expansion, distilled=mode == "distilled")
            found = await self._found(asked, seconds)
        seconds["total"] = time.perf_counter() - start
        for step, value in seconds.items():
            self.metrics.seconds.labels(step).observe(value)
        return Answer(found.hits, "plain" if late else mode, late, expansion, dict(seconds))

    async def _found(self, asked: Asked, seconds: collections.Counter[str]) -> Answered:
        """What a query finds; adds to the seconds of its steps."""
        found: Answered = await asyncio.wrap_future(self._submitted(self._searches, asked))
        seconds["encode"] += found.encode_seconds
        seconds["search"] += found.search_seconds
        return found

    async def expand(self, query: str, timeout: float) -> tuple[Expansion | None, float]:
        """What is written for a query, None if it is late, and what that took; errors as above."""
        start = time.perf_counter()
        self._check("expanded")
        expansion = await self._expansion(query, timeout)
        return expansion, time.perf_counter() - start

    async def put(self, documents: Sequence[tuple[str, str]]) -> int:
        """Adds or replaces documents; returns how many were replaced."""
        return await self._written(lambda: self.documents.put(documents))

    async def remove(self, name: str) -> bool:
        """Removes a document, if it is there."""
        return bool(await self._written(lambda: self.documents.remove([name])))

    async def get(self, name: str) -> str | None:
        """A document's text, if it is there."""
        self._check("plain")
        return self.documents.get(name)

    def close(self) -> None:
        """Cancels what waits, and closes the documents."""
        for batcher in (self._passages, self._searches):
            if batcher is not None:
                batcher.close()
        self._writers.shutdown()
        if self.documents is not None:
            self.documents.close()

    def _check(self, mode: str) -> None:
        """Refuses what this run never does, or not yet."""
        if self._searches is None:
            raise Refused(503, "loading", "the models are being loaded", 2)
        if self.is_ready(mode):
            return
        if mode == "auto" and self.expands and self._pair.gate is None:
            lacks = "this run has no gate: add expandr-gated to its evaluation.systems"
            raise Refused(409, "no-gate", lacks)
        if mode == "distilled":
            lacks = "this run has no export/query-encoder: train.distill makes it"
            raise Refused(409, "no-query-encoder", lacks)
        if not self.expands:
            raise Refused(409, "no-generator", "the service was started with --noexpand")
        raise Refused(503, "loading", "the generator is being loaded", 5)

    async def _expansion(self, query: str, timeout: float) -> Expansion | None:
        """What is written for a query, or None where that takes too long."""
        count = self.metrics.expansions
        if (found := self._expansions.find(query)) is not None:
            count.labels("kept").inc()
            return found
        making = asyncio.wrap_future(self._submitted(self._passages, query))
        try:
            # One that is late is made all the same, and there the next time.
            made = await asyncio.wait_for(asyncio.shield(making), timeout)
        except TimeoutError:
            making.add_done_callback(lambda done: done.cancelled() or done.exception())
            count.labels("late").inc()
            return None
        count.labels("made").inc()
        return made

    def _submitted(self, batcher: Batcher, item: object) -> concurrent.futures.Future:
        try:
            return batcher.submit(item)
        except Busy:
            raise Refused(429, "busy", "too many requests are waiting", 1) from None

    async def _written(self, write: Callable[[], int]) -> int:
        self._check("plain")
        if self._writes >= self.limits.writes:
            raise Refused(429, "busy", "too many writes are waiting", 1)
        self._writes += 1
        try:
            with self.metrics.timed("write"):
                return await asyncio.get_running_loop().run_in_executor(self._writers, write)
        except OSError as error:
            raise Refused(507, "disk", f"nothing was written: {error.strerror}", 60) from None
        finally:
            self._writes -= 1

    def _search(self, asked: Sequence[Asked]) -> list[Answered]:
        self.metrics.batch.labels("search").observe(len(asked))
        return self._pair.search(asked)

    def _expand(self, queries: Sequence[str]) -> list[Expansion]:
        self.metrics.batch.labels("expand").observe(len(queries))
        return self._expansions.make(queries)
