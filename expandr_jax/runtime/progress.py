"""Progress for people: a bar on a terminal, a line now and then in a log."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

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
SHARE_BEFORE_ESTIMATE = 0.02  # Share of the items; the first ones wait for programs to compile.


def plain_console(**options: Any) -> Console:
    """A console that prints texts as they are: "[v2]" and ":ok:" in them mean nothing to it."""
    return Console(highlight=False, markup=False, emoji=False, **options)


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Prints what a stage does, and its progress.

    Attributes:
        console: Where it is shown.
    """

    console: Console

    def say(self, text: str) -> None:
        """Prints a line of a stage, as it is."""
        self.console.print(f"  {text}", markup=False)

    @contextlib.contextmanager
    def progress(self, task: str, total: int, done: int = 0) -> Iterator[Callable[[float], None]]:
        """A bar with an estimate on a terminal, a line now and then elsewhere.

        Args:
            task: What is counted, as "documents encoded".
            total: Number of items.
            done: How many of them were done before.

        Yields:
            A function to call with the number of items done since its last call, by one thread;
            it may be a fraction where other processes do some of them.
        """
        if self.console.is_terminal:
            columns = (
                TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=True) as bar:
                task_id = bar.add_task(task, total=total, completed=done)
                yield lambda count: bar.advance(task_id, count)
            return
        finished, start = done, time.perf_counter()
        printed = start

        def advance(count: float) -> None:
            nonlocal finished, printed
            finished += count
            now = time.perf_counter()
            if now - printed < SECONDS_BETWEEN_LINES or finished <= done:
                return
            printed = now
            estimate = ""
            if finished - done > total * SHARE_BEFORE_ESTIMATE:
                left = (now - start) * (total - finished) / (finished - done)
                estimate = f", about {left:.0f} s left"
            self.console.print(f"  {task} {finished:.0f}/{total}{estimate}")

        yield advance


QUIET = Reporter(Console(quiet=True))  # Shows nothing.
