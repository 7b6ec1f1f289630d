"""The one exception that users see, and values as its message repeats them."""

from typing import Any

_SHOWN = 80  # Characters of a wrong value that a message repeats.


class UserError(Exception):
    """A mistake in the user's input: one line that says where, what is wrong and what to do.

    Entry points print it and exit with status 2; a traceback would only hide the answer.
    """


class NotFiniteError(UserError):
    """A number that should be finite is NaN or infinite: damaged weights, or training diverged.

    Attributes:
        row: Which of the texts or rows that were given it is of, from 0; None: of no single one.
    """

    def __init__(self, message: str, row: int | None = None):
        super().__init__(message)
        self.row = row


def shown(value: Any) -> str:
    """A value as messages repeat it: on one line of limited length."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
