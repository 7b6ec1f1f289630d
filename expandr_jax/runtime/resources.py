"""Measures the resources of each stage of a run, where a rehearsal asks for it.

A stage is a phase of a run, without those within it; what lies between phases counts as `BETWEEN`.
"""

import atexit
import contextlib
import functools
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import psutil

from expandr_jax.files.records import write_json

START, BETWEEN = "start", "between the stages"
SECONDS_BETWEEN_LOOKS = 0.01
LOOKS_BETWEEN_ARRAYS = 10  # Every so many looks, arrays on the devices are looked at, and children.
ARRAYS_BETWEEN_BIRTHS = 10  # Every so many of these, it is asked who the children are.
SECONDS_BETWEEN_DISKS = 0.5  # Looks at the disk, or ten times as long as one takes.
_GONE = " (deleted)"  # What Linux adds to the name of such a file.
_COMPILED = "backend_compile_duration"  # How the events of JAX end that tell of a program.


class Meter:
    """Measures this process from now on, stage by stage.

    Memory is what the process holds of its own (RSS without the pages of files, which the system
    takes back when it needs them), looked at by a thread, and what its children hold that nobody
    shares with them. On CPU, arrays on devices are part of it.
    Disk is what the workdir and the process's own temporary directory hold, with what it has open
    of them that has no name; another thread looks at it.

    Attributes:
        usage: Stage -> resource -> how much of it; see `RESOURCES`.
    """

    RESOURCES = ("memory_bytes", "device_bytes", "disk_bytes", "programs", "seconds")

    def __init__(self, path: pathlib.Path, scratch: pathlib.Path | None = None):
        """Usage goes to the file `path`, as JSON, each time a stage is over.

        `scratch` is where temporary files are, of this process alone.
        """
        self.usage: dict[str, dict[str, float]] = {}
        self._path, self._stages = path, [START]
        self._process, self._known = psutil.Process(), set[bytes]()
        self._children: list[psutil.Process] = []
        self._of_children = 0
        self._lock, self._peak, self._array = threading.Lock(), 0, 0
        self._scratch, self._disk, self._notes = scratch, 0, 0
        self._workdir: pathlib.Path | None = None
        self._programs, self._inside, self._since = 0, 0.0, time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        self._over = threading.Event()
        looking = self._watch, self._watch_disk
        watching = [threading.Thread(target=look, daemon=True) for look in looking]
        for thread in watching:
            thread.start()
        # JAX may be gone before a thread that asks it for arrays.
        atexit.register(lambda: (self._over.set(), [thread.join() for thread in watching]))

    @contextlib.contextmanager
    def stage(self, name: str, workdir: pathlib.Path) -> Iterator[None]:
        """A stage, which may have others within it; what is on disk is measured in `workdir`."""
        self._workdir = workdir
        self._note()
        if self._stages == [START]:
            self._stages = [BETWEEN]
        self._stages.append(name)
        try:
            yield
        finally:
            self._note()
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

    def _note(self) -> None:
        """Adds what was since the last note to the present stage."""
        self._look()
        self._look_at_disk()
        self._of_children = sum(map(_own_bytes, self._children))  # Some are gone.
        now = time.perf_counter()
        with self._lock:
            peak, self._peak = self._peak, 0
            array, self._array = self._array, 0
            disk, self._disk = self._disk, 0
            self._notes += 1
        if self._stages != [START]:  # Whoever asks for devices before decides which there are.
            array = max([array, *map(_results, self._new_programs())])
        usage = self.usage.setdefault(self._stages[-1], dict.fromkeys(self.RESOURCES, 0))
        usage["memory_bytes"] = max(usage["memory_bytes"], peak)
        usage["device_bytes"] = max(usage["device_bytes"], array)
        usage["disk_bytes"] = max(usage["disk_bytes"], disk)
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
            if looks % LOOKS_BETWEEN_ARRAYS:
                continue
            if looks % (LOOKS_BETWEEN_ARRAYS * ARRAYS_BETWEEN_BIRTHS) == 0:
                with contextlib.suppress(psutil.Error):  # Some end meanwhile.
                    self._children = self._process.children(recursive=True)
            self._of_children = sum(map(_own_bytes, self._children))
            if self._stages != [START]:
                largest = max(map(_shard_bytes, jax.live_arrays()), default=0)
                with self._lock:
                    self._array = max(self._array, largest)

    def _watch_disk(self) -> None:
        spent = 0.0
        while not self._over.wait(max(SECONDS_BETWEEN_DISKS, 10 * spent)):
            start = time.perf_counter()
            self._look_at_disk()
            spent = time.perf_counter() - start

    def _look_at_disk(self) -> None:
        notes, places = self._notes, [*filter(None, (self._workdir, self._scratch))]
        if self._workdir is None:
            return
        held = sum(map(_bytes_in, places)) + _bytes_without_a_name(places)
        with self._lock:
            if notes == self._notes:  # Else it is of a stage that is over.
                self._disk = max(self._disk, held)

    def _look(self) -> None:
        held = self._process.memory_info()
        with self._lock:
            own = held.rss - getattr(held, "shared", 0)
            self._peak = max(self._peak, own + self._of_children)


_meter: Meter | None = None


def start(path: pathlib.Path, scratch: pathlib.Path | None = None) -> None:
    """Measures this process from now on; programs, only those that are jitted from here on.

    So it is called before what it measures is imported. Arguments are as of `Meter`.
    """
    global _meter
    _meter = meter = Meter(path, scratch)
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


def _own_bytes(child: psutil.Process) -> int:
    """Bytes that a process shares with no other; 0 where it is gone."""
    with contextlib.suppress(psutil.Error):
        return child.memory_full_info().uss
    return 0


def _bytes_in(directory: pathlib.Path) -> int:
    total = 0
    for place, _, names in os.walk(directory):  # It passes over a directory that is gone by then.
        for name in names:
            with contextlib.suppress(OSError):  # Others move and remove files meanwhile.
                total += os.stat(os.path.join(place, name)).st_size
    return total


def _bytes_without_a_name(places: Collection[pathlib.Path]) -> int:
    """Bytes of what this process has open in some directories, and nobody else can find."""
    found, places = {}, [place.resolve() for place in places]
    with contextlib.suppress(OSError):  # Not every system has such a directory.
        for opened in pathlib.Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # Others close files meanwhile.
                name = os.readlink(opened)
                if name.endswith(_GONE) and any(map(pathlib.Path(name).is_relative_to, places)):
                    file = opened.stat()
                    found[file.st_ino] = file.st_size
    return sum(found.values())
