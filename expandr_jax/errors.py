"""The one exception that users see."""


class UserError(Exception):
    """A mistake in the user's input: one line that says where, what is wrong and what to do.

    Entry points print it and exit with status 2; a traceback would only hide the answer.
    """
