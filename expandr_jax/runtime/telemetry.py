"""The costs of a training step, spikes of its loss, and profiles."""

import collections
import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import psutil
from rich.console import Console

from expandr_jax.runtime.chips import known_chip
from expandr_jax.runtime.metrics_log import MetricsLog
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter

WINDOW, FEWEST_LOSSES = 50, 20  # Losses that a loss is compared with, at most and at least.
SPIKE = 8.0  # Standard deviations above their median.
STEPS_BEFORE_PROFILE = 2  # The first of a phase compile.


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of a batch.

    Attributes:
        ids: The ids of its examples.
        tokens: Number of tokens of its texts, without padding.
        flops: Operations of the model in this step; 0 where nobody has counted them.
        seconds: What parts of the step took, by their fields in metrics.jsonl, "update_seconds".
    """

    ids: Sequence[str]
    tokens: int = 0
    flops: float = 0.0
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def named(self) -> str:
        """The ids, for a message."""
        return f"examples {', '.join(self.ids)}" if self.ids else "its examples have no ids"


class Costs:
    """Time, speed and memory of each step: what differs from run to run."""

    def __init__(self, peak_flops: float | None):
        """`peak_flops`: operations a second of one device; None: as `runtime.chips` has."""
        if peak_flops is None:
            chip = known_chip(jax.devices()[0].device_kind)
            peak_flops = chip and chip.flops
        self._peak = peak_flops and peak_flops * jax.device_count()
        self._last = time.perf_counter()

    def of_step(self, contents: Contents) -> dict[str, float]:
        """Costs of the step that has just come back."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        costs = {"step_seconds": seconds, **contents.seconds}
        if contents.tokens:
            costs["tokens_per_second"] = contents.tokens / seconds
        if contents.flops and self._peak:
            costs["model_flops_utilisation"] = contents.flops / seconds / self._peak
        # The most that the first device has held, or, where it does not say, this process now.
        stats = jax.local_devices()[0].memory_stats() or {}
        held = stats.get("peak_bytes_in_use") or psutil.Process().memory_info().rss
        return costs | {"memory_bytes": held}


class SpikeWatch:
    """Finds losses far above those before them; it begins anew when a run is continued."""

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def median_if_spike(self, loss: float) -> float | None:
        """The median of the losses before, if this one is far above them."""
        before = list(self._losses)
        self._losses.append(loss)
        if len(before) < FEWEST_LOSSES:
            return None
        median = statistics.median(before)
        # The median distance from the median, as a standard deviation; outliers do not move it.
        deviation = 1.4826 * statistics.median(abs(x - median) for x in before)
        floor = 1e-2 * abs(median) + 1e-6
        return median if loss > median + SPIKE * max(deviation, floor) else None


class Profile:
    """A trace of so many steps (0: none) in a directory, for TensorBoard or Perfetto.

    Attributes:
        trace: Ends with the block that it is entered for.
    """

    def __init__(self, directory: str | os.PathLike = "", steps: int = 0):
        self._directory, self._steps, self._seen = directory, steps, 0
        self.trace = contextlib.ExitStack()

    def before_step(self) -> None:
        """Called before each step is dispatched, and waits for none of them."""
        if self._steps and self._seen == STEPS_BEFORE_PROFILE:
            self.trace.enter_context(jax.profiler.trace(str(self._directory)))
        elif self._seen == STEPS_BEFORE_PROFILE + self._steps:
            self.trace.close()
        self._seen += 1


@dataclasses.dataclass(frozen=True)
class TrainingLog:
    """Where a phase of training is recorded; as it is by default, nothing is kept or shown.

    A phase that is trained in parts, with evaluations in between, has one for all of them.

    Attributes:
        phase: Its name in metrics.jsonl.
        round_: Its round there, counted from 0.
        metrics: Gets a record of each step.
        reporter: Shows progress and losses far above those before.
        processes: This process among those that train together.
        spikes: Finds such losses.
        profile: Traces some of the steps.
        peak_flops: Operations a second of one device at most; None: as `runtime.chips` has.
        saved: Called with the place of each checkpoint that is on disk, for later messages.
        stopped: Called before a SIGTERM ends the program, when the step is saved.
    """

    phase: str
    round_: int = 0
    metrics: MetricsLog = dataclasses.field(default_factory=MetricsLog)
    reporter: Reporter = dataclasses.field(default_factory=lambda: Reporter(Console(quiet=True)))
    processes: Processes = dataclasses.field(default_factory=Processes)
    spikes: SpikeWatch = dataclasses.field(default_factory=SpikeWatch)
    profile: Profile = dataclasses.field(default_factory=Profile)
    peak_flops: float | None = None
    saved: Callable[[str], None] = lambda _: None
    stopped: Callable[[], None] = lambda: None
