"""Asks an HTTP service again and again, from several connections of one process.

It speaks just enough HTTP that it takes little of the cores that it shares with the service.
"""

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from expandr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Load:
    """What came of many requests.

    Attributes:
        milliseconds: What each took, of those that were answered.
        seconds: What all took together.
        errors: How many were not answered with status 200.
    """

    milliseconds: np.ndarray
    seconds: float
    errors: int

    def percentile(self, share: float) -> float | None:
        """Milliseconds that so many percent of the requests took at most."""
        return float(np.percentile(self.milliseconds, share)) if len(self.milliseconds) else None

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.milliseconds) / self.seconds


def bodies(queries: Sequence[str], **fields: object) -> list[bytes]:
    """A body of a request for each query."""
    return [json.dumps({"query": query, **fields}).encode() for query in queries]


def for_seconds(seconds: float) -> Callable[[], bool]:
    """Goes on until the time is over."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() < end


def for_requests(count: int) -> Callable[[], bool]:
    """Goes on until there were so many."""
    left = iter(range(count))
    return lambda: next(left, None) is not None


def run_load(
    port: int, path: str, contents: Sequence[bytes], clients: int, goes_on: Callable[[], bool]
) -> Load:
    """Asks again and again.

    Args:
        port: This machine's.
        path: Each request's, a POST.
        contents: Bodies, which are sent in turn.
        clients: Connections, each of which waits for its answer before it asks again.
        goes_on: Called before each request.
    """
    start = time.perf_counter()
    requests = [_request(path, content) for content in contents]
    took, errors = asyncio.run(_all(port, requests, clients, goes_on))
    return Load(np.array(took), time.perf_counter() - start, errors)


async def _all(
    port: int, requests: Sequence[bytes], clients: int, goes_on: Callable[[], bool]
) -> tuple[list[float], int]:
    took: list[float] = []
    turns, errors = itertools.cycle(requests), 0

    async def client() -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while goes_on():
            start = time.perf_counter()
            writer.write(next(turns))
            if await _status(reader) == 200:
                took.append(1000 * (time.perf_counter() - start))
            else:
                errors += 1
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return took, errors


def _request(path: str, content: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def _status(reader: asyncio.StreamReader) -> int:
    """Reads an answer whole, and returns its status."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ValueError):
        raise UserError("the service ended the connection") from None
    return int(head.split(b" ", 2)[1])
