"""How several processes share items that each of them needs to know, in their order."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from expandr_jax.runtime.processes import Processes

T = TypeVar("T")


def shares_in_turn(
    items: Sequence[T], at_once: int, processes: Processes
) -> Iterator[tuple[int, Sequence[T], int]]:
    """This process's share of some items after the others, so that all together keep their order.

    Yields the number of its first item, its items (there may be none), and how many all have.
    """
    size = -(-at_once // processes.count)
    for start in range(0, len(items), size * processes.count):
        first = start + size * processes.index
        every = min(size * processes.count, len(items) - start)
        yield first, items[first : first + size], every
