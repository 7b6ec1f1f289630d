"""Other processes of this machine that do some of the work, and end when this one does."""

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from expandr_jax.errors import UserError

MOST_WORKERS = 16  # Each has libraries of its own in memory, 0.3 GB.
_AHEAD = 2  # Items of each worker that wait, or whose results do.

T, R = TypeVar("T"), TypeVar("R")


def workers_here() -> int:
    """As many workers as this machine has cores for."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def mapped(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """What a function gives for each item, in their order, with few of both in memory.

    Args:
        function: One of a module, which the processes import; so they do the program's own.
        items: Read in this process.
        workers: How many processes; 1: none, it is called here.

    Raises:
        UserError: One of them has ended, as when it is killed for want of memory.
    """
    if workers < 2:
        yield from map(function, items)
        return
    # Not forked: JAX has threads, and a device may be open here, which others must not touch.
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin, (os.getpid(),)
    )
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise UserError(
            "a process that did some of the work ended, perhaps for want of memory; the same "
            "command goes on from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # The parent has the devices.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It says so by itself.
    end_with(parent)


@functools.cache
def end_with(parent: int) -> None:
    """Has this process end with its parent, also where that is killed.

    Else it would wait for ever to be asked, and keep open what it has read.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
