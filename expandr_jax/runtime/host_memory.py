"""Returns the host's freed memory to the system."""

import contextlib
import ctypes
import gc


def trim_memory() -> None:
    """Has the C library return free memory to the system.

    glibc keeps it for allocations to come, in an arena for each of XLA's threads, so that another
    thread does not find it: a second cache of keys and values then stands beside the first, freed
    one, and between the phases of a quick start up to 3 GB are kept.
    """
    with contextlib.suppress(OSError, AttributeError):  # Another C library, another system.
        ctypes.CDLL(None).malloc_trim(0)


def release_memory() -> None:
    """Frees objects that only refer to each other, and then does as `trim_memory`."""
    gc.collect()
    trim_memory()
