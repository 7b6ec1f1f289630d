"""Measures the resources of each stage of a run, where a rehearsal asks for it.

A stage is a phase of a run, without those within it; what lies between phases counts as `BETWEEN`.
"""

import atexit
import contextlib
import functools
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import psutil

from expandr_jax.files.records import write_json

START, BETWEEN = "start", "between the stages"
SECONDS_BETWEEN_LOOKS = 0.01
LOOKS_BETWEEN_ARRAYS = 10  # Every so many looks, arrays on the devices are looked at, too.
_COMPILED = "backend_compile_duration"  # How the events of JAX end that tell of a program.


class Meter:
    """Measures this process from now on, stage by stage.

    Memory is what the process holds of its own (RSS without the pages of files, which the system
    takes back when it needs them), looked at by a thread. On CPU, arrays on devices are part of it.

    Attributes:
        usage: Stage -> resource -> how much of it; see `RESOURCES`.
    """

    RESOURCES = ("memory_bytes", "device_bytes", "disk_bytes", "programs", "seconds")

    def __init__(self, path: pathlib.Path):
        """Usage goes to the file `path`, as JSON, each time a stage is over."""
        self.usage: dict[str, dict[str, float]] = {}
        self._path, self._stages = path, [START]
        self._process, self._known = psutil.Process(), set[bytes]()
        self._lock, self._peak, self._array = threading.Lock(), 0, 0
        self._programs, self._inside, self._since = 0, 0.0, time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._over = threading.Event()
        watching = threading.Thread(target=self._watch, daemon=True)
        watching.start()
        # JAX may be gone before a thread that asks it for arrays.
        atexit.register(lambda: (self._over.set(), watching.join()))

    @contextlib.contextmanager
    def stage(self, name: str, workdir: pathlib.Path) -> Iterator[None]:
        """A stage, which may have others within it; what is on disk is measured in `workdir`."""
        self._note(workdir)
        if self._stages == [START]:
            self._stages = [BETWEEN]
        self._stages.append(name)
        try:
            yield
        finally:
            self._note(workdir)
            self._stages.pop()

    def timed(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """A program, whose time counts as that of programs until its results are there."""

        @functools.wraps(program)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = program(*args, **kwargs)
            if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(result)):
                jax.block_until_ready(result)
                self._inside += time.perf_counter() - start
            return result

        for name in ("lower", "trace", "eval_shape", "clear_cache"):
            setattr(call, name, getattr(program, name))
        return call

    def _note(self, workdir: pathlib.Path) -> None:
        """Adds what was since the last note to the present stage."""
        self._look()
        now = time.perf_counter()
        with self._lock:
            peak, self._peak = self._peak, 0
            array, self._array = self._array, 0
        if self._stages != [START]:  # Whoever asks for devices before decides which there are.
            array = max([array, *map(_results, self._new_programs())])
        usage = self.usage.setdefault(self._stages[-1], dict.fromkeys(self.RESOURCES, 0))
        usage["memory_bytes"] = max(usage["memory_bytes"], peak)
        usage["device_bytes"] = max(usage["device_bytes"], array)
        usage["disk_bytes"] = max(usage["disk_bytes"], _bytes_in(workdir))
        usage["programs"] += self._programs
        usage["seconds"] += max(0.0, now - self._since - self._inside)
        self._programs, self._inside, self._since = 0, 0.0, now
        write_json(self._path, self.usage)

    def _new_programs(self) -> list[Any]:
        """Programs that were not there at the last note; those dropped meanwhile are not seen."""
        found = {p.fingerprint: p for p in jax.local_devices()[0].client.live_executables()}
        new = [program for mark, program in found.items() if mark not in self._known]
        self._known |= found.keys()
        return new

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event.endswith(_COMPILED):
            self._programs += 1

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self._look()
            looks += 1
            if looks % LOOKS_BETWEEN_ARRAYS == 0 and self._stages != [START]:
                largest = max(map(_shard_bytes, jax.live_arrays()), default=0)
                with self._lock:
                    self._array = max(self._array, largest)

    def _look(self) -> None:
        held = self._process.memory_info()
        with self._lock:
            self._peak = max(self._peak, held.rss - getattr(held, "shared", 0))


_meter: Meter | None = None


def start(path: pathlib.Path) -> None:
    """Measures this process from now on; programs, only those that are jitted from here on.

    So it is called before what it measures is imported.
    """
    global _meter
    _meter = meter = Meter(path)
    jit = jax.jit

    def timed_jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(timed_jit, **options)
        return meter.timed(jit(function, **options))

    jax.jit = timed_jit


def stage(name: str, workdir: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """A stage of a run in `workdir`, measured if `start` was called."""
    return contextlib.nullcontext() if _meter is None else _meter.stage(name, workdir)


def _shard_bytes(array: jax.Array) -> int:
    """Bytes of an array on one device."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def _results(program: Any) -> int:
    """Bytes on a device of a program's results, or of what it needs meanwhile, if that is more."""
    sizes = program.get_compiled_memory_stats()
    return max(sizes.output_size_in_bytes, sizes.temp_size_in_bytes)


def _bytes_in(directory: pathlib.Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # Others move and remove files meanwhile.
            total += path.stat().st_size if path.is_file() else 0
    return total
