"""Batches made ahead of training by worker processes (grain)."""

import os
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from expandr_jax.errors import UserError
from expandr_jax.runtime.workers import end_with

T = TypeVar("T")


class Ahead(Generic[T]):
    """A function of a step's number, called ahead of the steps in worker processes.

    What it gives is the same as in this process: which worker makes which step changes nothing.
    Grain's processes read its flags, which a program has parsed (absl.app.run) and others must.

    Attributes:
        make: The function; it is pickled, with what it refers to.
        last: The number of the step after the last.
        workers: Processes; each is one step ahead of what was asked for.
    """

    def __init__(self, make: Callable[[int], T], last: int, workers: int):
        self.make, self.last, self.workers = make, last, workers
        self._next, self._steps = -1, iter(())

    def __call__(self, number: int) -> T:
        """What the function gives for a step; those after it are expected next.

        Raises:
            UserError: A worker has ended, as when it is killed for want of memory.
        """
        if number != self._next:
            self.close()
            self._steps = self._begin(number)
        self._next = number + 1
        try:
            return next(self._steps)
        except RuntimeError as error:  # Grain's own, of a process that is gone.
            reason = str(error).split(". ")[0]
            raise UserError(
                f"step {number}: a process that makes batches ended ({reason}); lower mesh.workers "
                "if memory was short, and the same command goes on from the last checkpoint"
            ) from None

    def _begin(self, first: int) -> Iterator[T]:
        import grain  # Here, for Orbax comes with it.

        steps = grain.MapDataset.range(first, self.last).map(_InWorker(self.make))
        # One thread in each process: more would only wait for each other.
        steps = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        workers = min(self.workers, self.last - first)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        return iter(steps.mp_prefetch(options))

    def close(self) -> None:
        """Ends the processes."""
        if hasattr(self._steps, "close"):
            self._steps.close()
        self._next, self._steps = -1, iter(())


class _InWorker(Generic[T]):
    """A function in a process that ends with this one."""

    def __init__(self, make: Callable[[int], T]):
        self._make, self._parent = make, os.getpid()

    def __call__(self, number: int) -> T:
        if os.getpid() != self._parent:
            end_with(self._parent)
        return self._make(number)
