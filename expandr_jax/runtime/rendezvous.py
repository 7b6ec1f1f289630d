"""The processes of a run meet at the coordinator's address before JAX uses it.

JAX's own service waits for minutes and then ends the process with a stack of C++ where one process
is missing, two have one number, the counts differ or the address is taken: here each of these is a
line for the user.
"""

import contextlib
import selectors
import socket
import sys
import time

from expandr_jax.errors import UserError
from expandr_jax.runtime.connections import Connection, listen_on

START_SECONDS = 300.0  # For all processes to be started.
SECONDS_TO_ANSWER = 5.0  # For what a connection says first, or closes by.
SAY_AFTER = 5.0  # Seconds of waiting before it is said.


def await_all(host: str, port: int, count: int, index: int, seconds: float = START_SECONDS) -> None:
    """Returns when all processes are at process 0's address, which is free before and after.

    Args:
        host, port, count, index: As of `processes.start`.
        seconds: To wait for the others.

    Raises:
        UserError: Some are missing, or they do not fit together; all that have come are told.
    """
    if index == 0:
        _await_others(host, port, count, seconds)
    else:
        _join(host, port, count, index, seconds)


def _await_others(host: str, port: int, count: int, seconds: float) -> None:
    try:
        server = listen_on(host, port)
    except OSError as error:
        raise UserError(
            f"--coordinator={host}:{port}: process 0 cannot listen there: {error.strerror or error}"
            "; it takes an address of process 0's machine and a port that nobody uses"
        ) from None
    here: dict[int, Connection] = {}
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        stack.enter_context(server)
        selector.register(server, selectors.EVENT_READ)
        waiting = _Waiting(seconds)
        try:
            while len(here) < count - 1:
                missing = _numbers(set(range(1, count)) - set(here))
                if waiting.over(f"waiting at {host}:{port} for {missing} of {count}"):
                    raise UserError(
                        f"{missing} of {count} did not come to {host}:{port} within "
                        f"{seconds:.0f} s; start all, with the same --coordinator"
                    )
                for key, _ in selector.select(timeout=0.5):
                    if key.fileobj is not server:
                        raise UserError(f"process {key.data} ended before all had come")
                    try:
                        connection = Connection(server.accept()[0])
                    except OSError:  # It has gone again.
                        continue
                    stack.enter_context(contextlib.closing(connection))
                    hello = connection.first(SECONDS_TO_ANSWER)
                    if not all(isinstance(hello.get(key), int) for key in ("process", "count")):
                        connection.close()  # Anyone on the network may knock.
                        continue
                    number = hello["process"]
                    selector.register(connection, selectors.EVENT_READ, number)
                    known, here[number] = number in here, here.get(number, connection)
                    if hello["count"] != count:
                        raise UserError(
                            f"process {number} was started with --processes={hello['count']}, "
                            f"process 0 with --processes={count}"
                        )
                    if known or number == 0:
                        wrong = f"two processes have --process={number}"
                        connection.send({"error": wrong})
                        raise UserError(wrong)
        except UserError as error:
            for connection in here.values():
                connection.send({"error": str(error)})
            raise
        for connection in here.values():
            connection.send({"go": True})
        for connection in here.values():
            connection.first(SECONDS_TO_ANSWER)  # They close first, and so keep no port of ours.


def _join(host: str, port: int, count: int, index: int, seconds: float) -> None:
    waiting, reason = _Waiting(seconds), ""
    while True:
        if waiting.over(f"process {index} is waiting for process 0 at {host}:{port}"):
            raise UserError(
                f"process {index}: process 0 was not at {host}:{port} within {seconds:.0f} s "
                f"({reason}); start it too, and see that its machine can be reached"
            )
        try:
            tcp = socket.create_connection((host, port), timeout=5.0)
            with contextlib.closing(Connection(tcp)) as connection:
                connection.send({"process": index, "count": count})
                answer = connection.first(seconds + 10.0)
        except OSError as error:
            answer, reason = {}, error.strerror or str(error)
        if "error" in answer:
            raise UserError(answer["error"])
        if "go" in answer:
            return
        reason = reason or "what is there gives no answer"
        time.sleep(0.2)


class _Waiting:
    """Says once that something is waited for, and when it has been too long."""

    def __init__(self, seconds: float):
        self._start, self._seconds, self._said = time.monotonic(), seconds, False

    def over(self, what: str) -> bool:
        waited = time.monotonic() - self._start
        if waited > SAY_AFTER and not self._said:
            self._said = True
            print(f"{what}, {self._seconds:.0f} s at most", file=sys.stderr, flush=True)
        return waited > self._seconds


def _numbers(numbers: set[int]) -> str:
    several = "processes" if len(numbers) > 1 else "process"
    return f"{several} {', '.join(map(str, sorted(numbers)))}"
