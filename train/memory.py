"""Memory that a phase has freed goes back to the system."""

import contextlib
import ctypes
import gc


def release_memory() -> None:
    """Has the C library return what is free.

    glibc keeps it for allocations to come, in an arena for each of XLA's threads: between the
    phases of a quick start that is up to 3 GB, which the next phase does not find where it asks.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Another C library, another system.
        ctypes.CDLL(None).malloc_trim(0)
