"""A benchmark for the tests of eval.speed: its sides, and what is measured, are given numbers."""

import itertools
import os
import pathlib

import numpy as np

from eval.benchmarks import Comparison, Running, check_close


def prepare(directory: pathlib.Path) -> None:
    (directory / "input.txt").write_text("3")


def tune(directory: pathlib.Path) -> None:
    if "TOY_UNTUNED" in os.environ:
        raise RuntimeError("tuned")
    (directory / "setting.txt").write_text("its best")


def side(rates, difference=0.0):
    def start(directory: pathlib.Path) -> Running:
        value = float((directory / "input.txt").read_text())
        numbers = iter(rates)
        print("what a library prints")
        best = directory / "setting.txt"
        setting = best.read_text() if difference and best.exists() else "as set"
        return Running(lambda: next(numbers), {"value": np.array([value + difference])}, setting)

    return start


def check(ours, theirs):
    return check_close(ours["value"], theirs["value"], 1e-3, "values")


def fails(directory: pathlib.Path) -> Running:
    raise RuntimeError("no such thing")


def row(name, package, ours, peer, **costs):
    return Comparison(name, "things/s", "numpy", (package,), ours, peer, check, **costs)


GOOD = row(
    "good", "numpy", side([30.0, 10.0, 20.0]), side([5.0, 4.0, 80.0], 1e-4),
    tune=tune, flops=lambda directory: 2e6, bytes=lambda directory: 4e6,
)  # fmt: skip
ABSENT = row("absent", "no-such-distribution", side(itertools.repeat(7.0)), fails, tune=fails)
ROWS = (GOOD, ABSENT)
