"""The directory of a service, which one process has at a time."""

import fcntl
import pathlib
from typing import IO

from expandr_jax.errors import UserError


def take(state: pathlib.Path) -> IO[str]:
    """Makes a directory, and keeps other servers out of it until what is returned is closed.

    Raises:
        UserError: It cannot be written, or another server has it.
    """
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = open(state / "lock", "w")  # noqa: SIM115 (held for the server's life)
    except OSError as error:
        why = f"cannot be written: {error.strerror}; use another --state"
        raise UserError(f"{state}: {why}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"{state}: another server has this state; use another --state") from None
    return lock
