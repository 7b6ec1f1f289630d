"""The one exception that users see."""


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
