"""The metrics of a service, for Prometheus."""

import contextlib
import time
from collections.abc import Callable, Iterator

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_COMPILED = "/jax/core/compile/backend_compile_duration"
_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30,
)  # fmt: skip


class ServiceMetrics:
    """Counters and times; no text of a query or a document is among their labels."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.answers = Counter(
            "expandr_answers", "Answers by path and status.", ["path", "status"], registry=own
        )
        self.seconds = Histogram(
            "expandr_seconds", "What a step of an answer takes.", ["step"],
            buckets=_SECONDS, registry=own,
        )  # fmt: skip
        self.expansions = Counter(
            "expandr_expansions", "Expansions asked for, by what came of them.", ["outcome"],
            registry=own,
        )  # fmt: skip
        self.gated = Counter(
            "expandr_gated", "Queries by how the gate would have them answered.", ["mode"],
            registry=own,
        )  # fmt: skip
        self.batch = Histogram(
            "expandr_batch_size", "Requests that were worked off together.", ["step"],
            buckets=(1, 2, 4, 8, 16, 32), registry=own,
        )  # fmt: skip
        self.documents = Gauge("expandr_documents", "Documents that are searched.", registry=own)
        self.writes = Gauge("expandr_writes", "Writes of documents, ever.", registry=own)
        self.waiting = Gauge("expandr_waiting", "Requests that wait.", ["step"], registry=own)
        self.ready = Gauge("expandr_ready", "1: this mode answers.", ["mode"], registry=own)
        self.compiled = Counter("expandr_compilations", "Programs compiled.", registry=own)
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def watch(self, gauge: Gauge, value: Callable[[], float]) -> None:
        """Has a gauge ask for its value whenever it is read."""
        gauge.set_function(value)

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Times a step."""
        start = time.perf_counter()
        yield
        self.seconds.labels(step).observe(time.perf_counter() - start)

    def text(self) -> bytes:
        """All metrics, in Prometheus's text format."""
        return generate_latest(self.registry)

    def _heard(self, event: str, _: float, **__: object) -> None:
        if event == _COMPILED:
            self.compiled.inc()
