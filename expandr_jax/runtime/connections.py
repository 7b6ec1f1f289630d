"""Connections between the processes of a run: objects of JSON, a line each, over TCP.

A connection ends with its process, so that one that dies is noticed at once.
"""

import contextlib
import json
import queue
import secrets
import socket
import threading
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

SECONDS_TO_CONNECT = 60.0
SECONDS_FOR_HELLO = 10.0  # From one that has connected; anyone on the network may.
LONGEST_HELLO = 4096  # Bytes.
ADDRESS_BYTES = 256


class Connection:
    """Messages to and from another process, an object of JSON a line.

    Attributes:
        open: Whether the other end may still say something.
    """

    def __init__(self, tcp: socket.socket):
        # From a machine that is gone nothing comes, not even an end.
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", 20_000),
        ):  # fmt: skip
            if hasattr(socket, name):
                tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        tcp.settimeout(None)
        self._tcp = tcp
        self._lines = tcp.makefile("rb")
        self._messages: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self.open = True

    def send(self, message: dict[str, Any]) -> None:
        """Sends a message; what becomes of a lost connection, `listen` finds out."""
        data = json.dumps(message).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):
            self._tcp.sendall(data)

    def receive(self, kind: str) -> Any:
        """The content of the next message, which must be of this kind."""
        found, value = self.take()
        if found != kind:
            raise RuntimeError(f"processes are out of step: expected {kind!r}, got {found!r}")
        return value

    def take(self) -> tuple[str, Any]:
        """The kind and the content of the next message."""
        (message,) = self._messages.get().items()
        return message

    def answer(self) -> Any:
        """The content of the next message of the kind "answer"; others may have come before it."""
        return self._answers.get()["answer"]

    def first(self, seconds: float = SECONDS_FOR_HELLO) -> dict[str, Any]:
        """The first message, before `listen`; {} where none comes in time that is one."""
        self._tcp.settimeout(seconds)
        try:
            message = json.loads(self._lines.readline(LONGEST_HELLO))
        except (OSError, ValueError):
            message = None
        self._tcp.settimeout(None)
        return message if isinstance(message, dict) else {}

    def listen(self) -> dict[str, Any] | None:
        """Receives messages until the other end closes; returns its last words, if it had any."""
        try:
            for line in self._lines:
                message = json.loads(line)
                if "end" in message:
                    return message["end"]
                (self._answers if "answer" in message else self._messages).put(message)
        except (OSError, ValueError):
            pass  # Half a line, or none any more: it is gone.
        finally:
            self.open = False
        return None

    def fileno(self) -> int:
        """The file descriptor, for `selectors`."""
        return self._tcp.fileno()

    def close(self) -> None:
        """Closes the connection; nothing more is sent or received."""
        self._lines.close()
        self._tcp.close()


def connect_all(index: int, count: int, host: str | None) -> dict[int, Connection]:
    """Connects process 0, which says to all where it listens, with the others.

    Args:
        index, count: As of `processes.Processes`.
        host: Where process 0 listens; None: at its own address.

    Returns:
        The connections by the index of the process at the other end: all others in process 0,
        which is the only one in theirs.

    Raises:
        OSError: No connection came about.
    """
    said, server = "", None
    if index == 0:
        host = host or _own_address()
        server = listen_on(host)
        said = json.dumps([host, server.getsockname()[1], secrets.token_hex(8)])
    padded = np.frombuffer(said.encode().ljust(ADDRESS_BYTES), np.uint8)
    padded = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    host, port, token = json.loads(padded.tobytes())
    if server is None:
        connection = Connection(socket.create_connection((host, port), timeout=SECONDS_TO_CONNECT))
        connection.send({"process": index, "token": token})
        return {0: connection}
    connections: dict[int, Connection] = {}
    with server:
        server.settimeout(SECONDS_TO_CONNECT)
        while len(connections) < count - 1:
            connection = Connection(server.accept()[0])
            hello = connection.first()
            if hello.get("token") == token:
                connections[hello["process"]] = connection
    return dict(sorted(connections.items()))


def listen_on(host: str, port: int = 0) -> socket.socket:
    """A server at an address, or at all of this machine's where that is none of its own.

    The others may know it by such a one. Raises the first address's OSError if neither can be.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        try:
            return socket.create_server(("", port))
        except OSError:
            raise error from None


def _own_address() -> str:
    """This machine's address, as others on its network see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("10.255.255.255", 1))  # Sends nothing: it only chooses the interface.
        return probe.getsockname()[0]
