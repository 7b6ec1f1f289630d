"""Rows for the tests of eval.speed that must not be measured."""

from tests.toy_benchmark import fails, prepare, row, side

__all__ = ["ROWS", "prepare"]

ROWS = (
    row("different", "numpy", side([1.0]), side([1.0], 0.5)),
    row("failing", "numpy", side([1.0]), fails),
)
