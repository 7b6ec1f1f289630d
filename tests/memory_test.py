"""Freed memory goes back to the system."""

import ctypes

import numpy as np
import psutil
import pytest

from train.memory import release_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="no glibc")
def test_what_was_freed_below_something_that_stays_is_returned():
    pieces = [np.ones(12_000) for _ in range(3000)]  # Too small for a mapping of their own.
    stays = pieces[-1]
    held = psutil.Process().memory_info().rss
    del pieces
    release_memory()
    assert held - psutil.Process().memory_info().rss > 200e6
    assert stays.sum() == 12_000
