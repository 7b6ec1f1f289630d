"""A benchmark for the tests of eval.speed: its sides, and what is measured, are given numbers."""

import itertools
import pathlib

import numpy as np

from eval.benchmarks import Comparison, Running, check_close


def prepare(directory: pathlib.Path) -> None:
    (directory / "input.txt").write_text("3")


def side(rates, difference=0.0):
    def start(directory: pathlib.Path) -> Running:
        value = float((directory / "input.txt").read_text())
        numbers = iter(rates)
        print("what a library prints")
        return Running(lambda: next(numbers), {"value": np.array([value + difference])}, "as set")

    return start


def check(ours, theirs):
    return check_close(ours["value"], theirs["value"], 1e-3, "values")


def fails(directory: pathlib.Path) -> Running:
    raise RuntimeError("no such thing")


def row(name, package, ours, peer, **costs):
    return Comparison(name, "things/s", "numpy", (package,), ours, peer, check, **costs)


GOOD = row(
    "good", "numpy", side([30.0, 10.0, 20.0]), side([5.0, 4.0, 80.0], 1e-4),
    flops=lambda directory: 2e6, bytes=lambda directory: 4e6,
)  # fmt: skip
ABSENT = row("absent", "no-such-distribution", side(itertools.repeat(7.0)), fails)
ROWS = (GOOD, ABSENT)
