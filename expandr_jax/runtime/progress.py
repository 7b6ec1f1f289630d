"""Progress for people: a bar on a terminal, a line now and then in a log."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 10.0  # Where there is no terminal to draw a bar on.
SHARE_BEFORE_ESTIMATE = 0.02  # Of the items; the first ones wait for programs to compile.


@contextlib.contextmanager
def progress(
    console: Console, task: str, total: int, done: int = 0
) -> Iterator[Callable[[int], None]]:
    """A bar with an estimate on a terminal, a line now and then elsewhere.

    Args:
        console: Where it is shown.
        task: What is counted, as "documents encoded".
        total: Number of items.
        done: How many of them were done before.

    Yields:
        A function to call with the number of items done since its last call, by one thread.
    """
    if console.is_terminal:
        columns = (
            TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True) as bar:
            task_id = bar.add_task(task, total=total, completed=done)
            yield lambda count: bar.advance(task_id, count)
        return
    state = _Counter(done, time.perf_counter(), time.perf_counter(), done)

    def advance(count: int) -> None:
        state.done += count
        now = time.perf_counter()
        if now - state.printed < SECONDS_BETWEEN_LINES or state.done <= state.first:
            return
        state.printed = now
        estimate = ""
        if state.done - state.first > total * SHARE_BEFORE_ESTIMATE:
            left = (now - state.start) * (total - state.done) / (state.done - state.first)
            estimate = f", about {left:.0f} s left"
        console.print(f"  {task} {state.done}/{total}{estimate}")

    yield advance


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Where a stage tells people what it does.

    Attributes:
        console: Where it is shown.
    """

    console: Console

    def say(self, text: str) -> None:
        """Prints a line of a stage, as it is."""
        self.console.print(f"  {text}", markup=False)

    def progress(
        self, task: str, total: int, done: int = 0
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """`progress` on this console, with its arguments."""
        return progress(self.console, task, total, done)


@dataclasses.dataclass
class _Counter:
    """Items done, when it began, when a line was last printed, items done before it began."""

    done: int
    start: float
    printed: float
    first: int
