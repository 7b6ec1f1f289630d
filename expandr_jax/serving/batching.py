"""Batches concurrent requests for one worker thread, in the order in which they came."""

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import Any


class Busy(Exception):
    """Raised where too many requests are waiting already."""


class Batcher:
    """A bounded queue in front of a function of several items.

    While the function runs, requests gather for its next call; a single one never waits for others.

    Args:
        work: Items to their results, in order; what it raises, each of them gets.
        most: Items of a call.
        capacity: Items that wait, at most.
        name: The thread's.
    """

    def __init__(
        self, work: Callable[[Sequence[Any]], Sequence[Any]], most: int, capacity: int, name: str
    ):
        self._work, self._most, self._capacity = work, most, capacity
        self._items: collections.deque[tuple[Any, concurrent.futures.Future]] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        return len(self._items)

    def submit(self, item: Any) -> concurrent.futures.Future:
        """Queues an item; one whose future is cancelled before its turn is passed over.

        Raises:
            Busy: The queue is full, or closed.
        """
        future: concurrent.futures.Future = concurrent.futures.Future()
        with self._changed:
            if self._closed or len(self._items) >= self._capacity:
                raise Busy
            self._items.append((item, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Gives up what waits, and returns when the function has."""
        with self._changed:
            self._closed = True
            for _, future in self._items:
                future.cancel()
            self._items.clear()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            wanted = [one for one in batch if one[1].set_running_or_notify_cancel()]
            if wanted:
                self._answer(*zip(*wanted, strict=True))

    def _next(self) -> list[tuple[Any, concurrent.futures.Future]] | None:
        """The next batch; None when the queue is closed."""
        with self._changed:
            while not self._items and not self._closed:
                self._changed.wait()
            if not self._items:
                return None
            return [self._items.popleft() for _ in range(min(self._most, len(self._items)))]

    def _answer(self, items: Sequence[Any], futures: Sequence[concurrent.futures.Future]) -> None:
        try:
            results = self._work(items)
        except Exception as error:
            for future in futures:
                future.set_exception(error)
            return
        for future, result in zip(futures, results, strict=True):
            future.set_result(result)
