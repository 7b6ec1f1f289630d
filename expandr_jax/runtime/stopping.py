"""SIGTERM, the notice that a machine will be taken: what is in hand is finished and saved.

Anywhere else the program ends as soon as the operation that runs comes back: what counts is on disk
already. `held` marks the parts that end themselves, such as a step of training and its save.
"""

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(SystemExit):
    """Ends the program with exit status 0 and a line that says how to go on."""

    def __init__(self, where: str = "") -> None:
        super().__init__(0)
        self.where = where

    @property
    def message(self) -> str:
        """What to tell the user."""
        command = shlex.join(["python", *sys.orig_argv[1:]])
        return f"stopped by SIGTERM{self.where}; the same command goes on from here: {command}"


@dataclasses.dataclass
class Notice:
    """Whether a SIGTERM has come while it was held back.

    Attributes:
        where: Goes into the line that says how to go on, as " at step 3, saved".
    """

    requested: bool = False
    where: str = ""

    def note(self, *_: Any) -> None:
        """The handler of SIGTERM meanwhile."""
        self.requested = True


def end_on_sigterm() -> None:
    """Makes SIGTERM raise `Stopped` in the main thread."""
    signal.signal(signal.SIGTERM, _stop)


def notice_again(exception: BaseException | None) -> bool:
    """For exceptions that Python drops, as those of finalizers: whether it was a `Stopped`.

    If so the notice comes once more, a moment later.
    """
    if not isinstance(exception, Stopped):
        return False
    end_on_sigterm()
    again = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True
    again.start()
    return True


def ignore_sigterm() -> None:
    """For the last moments of a program, which has nothing more to save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stop(*_: Any) -> None:
    ignore_sigterm()  # A second notice must not interrupt what the first one has begun.
    raise Stopped


@contextlib.contextmanager
def held() -> Iterator[Notice]:
    """Holds a SIGTERM back until the block ends, and then raises `Stopped`.

    Only the main thread can; in another the notice is not seen here, and ends the main thread. A
    block within another leaves the ending to that one.

    Yields:
        The notice: a loop looks at `requested` to end early.
    """
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():
        yield notice
        return
    previous = signal.signal(signal.SIGTERM, notice.note)
    try:
        yield notice
    finally:
        signal.signal(signal.SIGTERM, previous)
    if isinstance(outer := getattr(previous, "__self__", None), Notice):
        outer.requested |= notice.requested
    elif notice.requested:
        if previous is _stop:
            ignore_sigterm()
        raise Stopped(notice.where)
