"""Several processes of one run, as on the hosts of a pod: who does what, and what ends them all.

Arrays move by JAX's own collectives. Whatever else processes tell each other goes through process 0
over TCP, without a time limit, and a connection ends with its process. In JAX's own service
each wait (for a key, at a barrier) has a time limit, and a lost process is found by heartbeats, in
100 seconds by default; `multihost_utils` moves arrays by collectives, which a lost process leaves
hanging, and its preemption sync point must be asked at the same steps everywhere. What would be
lost, tests/processes_runs_test.py shows: a killed process ends the others within seconds and in a
line, and SIGTERM to one saves and ends all. (tests/kills_test.py kills runs of one process.)
"""

import contextlib
import glob
import importlib.util
import io
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from expandr_jax.errors import UserError
from expandr_jax.runtime.connections import Connection, connect_all
from expandr_jax.runtime.rendezvous import await_all

EXIT_LOST = 3  # Another process ended without a word.
GOES_ON = "the same commands go on from here"
# For the end of another process to be heard of, which then ends this one: a collective in a step or
# a save that it was part of may fail first, and say less.
SECONDS_FOR_NEWS = 3.0
SECONDS_TO_STOP = 20.0  # For what a process has in hand when another was stopped by SIGTERM.
_EXCHANGED = 1 << 20  # Bytes, of which what processes exchange at once is a multiple.

T = TypeVar("T")


class SharedFiles:
    """How files of one process come to the others: here, they have a directory in common.

    Attributes:
        common: Whether they have; else each has a copy of its own disk.
    """

    common = True

    def push(self, *, later: bool = False) -> int:
        """Lets the others have what this process wrote; `later`: it may wait for another call."""
        return 0

    def pull(self, versions: Mapping[int, int]) -> None:
        """Takes what others have pushed; `versions`: what that returned, by their numbers."""

    def read(self, path: pathlib.Path, start: int, end: int) -> bytes:
        """The bytes, from one to another, of a file of process 0's that need not be here."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


class Processes:
    """This process among those of a run.

    All of them call the same methods in the same order, from their main threads.

    Attributes:
        index: Which one this is, from 0.
        count: How many there are; 1 where nothing was connected.
        stopped: What another process said that was stopped by SIGTERM; None: there is none.
        files: How their files come to each other.
    """

    def __init__(self, index: int = 0, count: int = 1):
        self.index, self.count = index, count
        self.files = SharedFiles()
        self.stopped: str | None = None
        self._connections: dict[int, Connection] = {}
        self._alone = count == 1  # As is the first one within `once`.
        self._leaving = threading.Event()
        self._served: dict[str, Callable[[Any], Any]] = {}

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes the run's files."""
        return self.index == 0

    @property
    def suffix(self) -> str:
        """Tells a file that each process has of its own; "" where there is one process."""
        return f"-process-{self.index}" if self.count > 1 else ""

    def share(self, items: Sequence[T], key: Callable[[T], Any]) -> list[T]:
        """The items of which this process takes care; those of one key stay together."""
        numbers: dict[Any, int] = {}
        for item in items:
            numbers.setdefault(key(item), len(numbers))
        return [item for item in items if numbers[key(item)] % self.count == self.index]

    def once(self, function: Callable[[], T]) -> T:
        """The result of a function that process 0 alone calls, while the others wait.

        Its files are there for all of them afterwards. Within the function, process 0 counts as
        being by itself.

        Args:
            function: Returns a value of JSON.
        """
        if self._alone:
            value = function()
            self.files.push()
            return value
        if not self.is_main:
            value, version = self._awaited("once")
            self.files.pull({0: version})
            return value
        self._alone = True
        try:
            value = function()
            version = self.files.push()
        finally:
            self._alone = False
        for connection in self._connections.values():
            connection.send({"once": [value, version]})
        return value

    def main_first(self, function: Callable[[], T]) -> T:
        """The result of a function that all call, process 0 before the others: it may mend files.

        None goes on before all have called it, and so finds what process 0 changes later.
        """
        if self._alone:
            return self.once(function)
        if self.is_main:
            value = function()
        self.once(lambda: None)
        if not self.is_main:
            value = function()
        self.barrier()
        return value

    def of_files(self, function: Callable[[], T]) -> T:
        """What a function (to a value of JSON) finds in files, which may take minutes to read.

        Where all have one directory, process 0 alone calls it; else each does, of its own files.
        """
        return self.once(function) if self.files.common else self.main_first(function)

    def gather(self, value: Any) -> list[Any]:
        """The value (of JSON) that each process gives, by its number, to all of them."""
        if self._alone:
            return [value]
        if not self.is_main:
            self._connections[0].send({"gather": value})
            return self._awaited("gathered")
        values = [value, *(self._connections[i].receive("gather") for i in range(1, self.count))]
        for connection in self._connections.values():
            connection.send({"gathered": values})
        return values

    def exchange(self, arrays: Mapping[str, np.ndarray]) -> list[Mapping[str, np.ndarray]]:
        """The arrays that each process gives, by its number, to all of them.

        There may be many: they go from device to device, and not through process 0.
        """
        if self._alone:
            return [arrays]
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        data = buffer.getvalue()
        sizes = self.gather(len(data))
        # Rounded, so that few sizes are compiled.
        sent = np.zeros(-(-max(sizes) // _EXCHANGED) * _EXCHANGED, np.uint8)
        sent[: len(data)] = np.frombuffer(data, np.uint8)
        found = multihost_utils.process_allgather(sent)
        parts = (io.BytesIO(part[:size]) for part, size in zip(found, sizes, strict=True))
        return [{**np.load(part, allow_pickle=False)} for part in parts]

    def serve(self, name: str, function: Callable[[Any], Any]) -> None:
        """Registers this process's part in what process 0 asks of all by `call` or `tell`.

        Args:
            name: What all processes know it by; a later function of this name takes its place.
            function: Takes and returns values of JSON.
        """
        self._served[name] = function

    def call(self, name: str, argument: Any) -> list[Any]:
        """What the function that is served by this name returns in each process, by its number.

        Process 0 alone calls, within `once` too; each of the others answers when it next waits for
        process 0. Their files are there for each other, as after `barrier`.
        """
        version = self.files.push()
        for connection in self._connections.values():
            connection.send({"call": [name, argument, version]})
        values, versions = [self._served[name](argument)], {}
        for index, connection in self._connections.items():
            value, versions[index] = connection.answer()
            values.append(value)
        self.files.pull(versions)
        return values

    def tell(self, name: str, argument: Any) -> None:
        """Has each process do what is served by this name, of which nothing is returned.

        Process 0 alone tells, and does not wait: the others do it when they next wait for it.
        """
        for connection in self._connections.values():
            connection.send({"tell": [name, argument]})
        self._served[name](argument)

    def _awaited(self, kind: str) -> Any:
        """The content of process 0's next message of this kind; answers its calls until then."""
        connection = self._connections[0]
        while True:
            found, value = connection.take()
            if found == kind:
                return value
            if found == "tell":
                name, argument = value
                self._served[name](argument)
                continue
            if found != "call":
                raise RuntimeError(f"processes are out of step: expected {kind!r}, got {found!r}")
            name, argument, version = value
            self.files.pull({0: version})
            answer = self._served[name](argument)
            connection.send({"answer": [answer, self.files.push()]})

    def barrier(self) -> None:
        """Returns when all processes are here; each finds what the others wrote before."""
        self.files.pull(dict(enumerate(self.gather(self.files.push()))))

    def any(self, value: bool) -> bool:
        """Whether it is true in some process."""
        return any(self.gather(bool(value)))

    def all(self, value: bool) -> bool:
        """Whether it is true in every process."""
        return all(self.gather(bool(value)))

    def finish(self) -> None:
        """Waits for the others at the end of a run; from then on they may leave."""
        self.barrier()
        self._leaving.set()
        self.barrier()

    def leave(self, status: int, reason: str) -> None:
        """Ends this process, and by that all of them, before the run is at its end.

        Args:
            status: Exit status; 0: it was stopped by SIGTERM, and so will the others be.
            reason: What they tell their users, in one line.
        """
        if self.count == 1:
            return
        if not self._leaving.is_set():
            self._leaving.set()
            self._tell(None, {"process": self.index, "status": status, "reason": reason})
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        self._exit(status)

    def _exit(self, status: int) -> None:
        # JAX in the others must not miss its service, which process 0 has, before they are done.
        end = time.monotonic() + SECONDS_TO_STOP
        while self.is_main and time.monotonic() < end:
            if not any(connection.open for connection in self._connections.values()):
                break
            time.sleep(0.02)
        os._exit(status)  # Not sys.exit: JAX would wait for the others for minutes.

    def connect(self, connections: dict[int, Connection]) -> None:
        """Listens to the processes at the other ends: to process 0, or in it to all others."""
        self._connections = connections
        for index, connection in connections.items():
            threading.Thread(target=self._listen, args=(index, connection), daemon=True).start()

    def _listen(self, index: int, connection: Connection) -> None:
        last = connection.listen()
        if last is None:
            reason = "it was killed, or its machine is gone"
            last = {"process": index, "status": EXIT_LOST, "reason": reason}
        if self._leaving.is_set():
            return
        self._leaving.set()
        self._tell(index, last)
        who, status, reason = last["process"], last["status"], last["reason"]
        if status == 0:
            # As if the notice had come here: what is in hand is finished, if that can be done.
            self.stopped = reason
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(SECONDS_TO_STOP)
        else:
            reason = f"error: process {who} ended: {reason}"
        if status == EXIT_LOST:
            reason = f"{reason}; {GOES_ON}"
        with contextlib.suppress(OSError):
            os.write(2, f"{reason}\n".encode())
        self._exit(status)

    def _tell(self, source: int | None, end: dict[str, Any]) -> None:
        """Passes on the end of a process, to all but the one it was heard from."""
        for index, connection in self._connections.items():
            if index != source:
                connection.send({"end": end})


_current = Processes()


def current() -> Processes:
    """This process among those that `start` has connected."""
    return _current


def check_address(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Raises UserError unless all of them, as for `start`, are given, or none, or a count of 1."""
    given = [part is not None for part in (coordinator, count, index)]
    if count == 1 or not any(given):
        return
    if not all(given):
        raise UserError(
            "--coordinator=HOST:PORT, --processes=N and --process=I go together; on a TPU pod "
            "leave all three out"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT")
    if not 0 <= index < count:
        raise UserError(f"--process={index}: expected 0 to {count - 1}")


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Connects the processes of a run, before JAX is used for anything else.

    Args:
        coordinator: HOST:PORT of process 0, free there and the same for all.
        count: How many there are; 1: nothing is connected. None, as all else, on a pod, which
            knows.
        index: Which of them this one is, from 0.

    Raises:
        UserError: They do not fit together, or the others cannot be reached or do not come.
    """
    global _current
    check_address(coordinator, count, index)
    if count == 1 or (count is None and not _is_tpu_host()):
        return
    # Its own handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Two programs at once could take each other's messages on a processor.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    host, _, port = (coordinator or "").rpartition(":")
    if count is not None:
        await_all(host, int(port), count, index)
    try:
        # The connections here find a lost process sooner, and end the others in a line.
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=600)
    except ValueError:
        if count is not None:
            raise
        return  # Chips, but not of a machine that JAX knows.
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the processes cannot reach each other: {reason[:300]}") from None
    index, count = jax.process_index(), jax.process_count()
    if count > 1:
        _current = Processes(index, count)
        try:
            _current.connect(connect_all(index, count, host or None))
        except OSError as error:
            raise UserError(f"the processes cannot reach each other: {error}") from None


def _is_tpu_host() -> bool:
    """Whether this machine has TPU chips that JAX would use."""
    platforms = jax.config.jax_platforms or ""
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = not platforms or "tpu" in platforms.split(",")
    return wanted and bool(chips) and importlib.util.find_spec("libtpu") is not None
