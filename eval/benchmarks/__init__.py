"""What `eval.speed` measures: one module a benchmark, each against what else would do the work.

A module of this package has a name that `--only` takes and defines

    ROWS: a tuple of `Comparison`, one for each row of the table
    prepare(directory): writes the inputs that both sides read, once, in a process of its own

A side is a function `start(directory) -> Running`: in a fresh process it reads what `prepare`
wrote, loads its model, compiles and warms up, and returns a function that repeats the work, and the
work's results. Modules are imported by both sides' processes and by the launcher, so they import
nothing heavy at the top: jax, torch and the like go inside the functions.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

NAMES = (
    *("sampling", "dpo", "grpo", "encode", "contrastive", "search", "rewards", "load"),
    *("rerank", "lora"),
)
THREADS = 2  # Each side has so many: OMP_NUM_THREADS of its process, and its cores.


class Different(Exception):
    """The results of the two sides differ; the message says in what."""


@dataclasses.dataclass(frozen=True)
class Running:
    """A side that is ready to be measured.

    Attributes:
        run: Does all the work once and returns how much of it a second, in the row's unit.
        outputs: This side's results by name, for `Comparison.check`.
        setting: What it set for itself, such as its best batch size; for people.
    """

    run: Callable[[], float]
    outputs: Mapping[str, np.ndarray]
    setting: str = ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row: the same work done by this project and by a peer.

    Attributes:
        name: Name of the row.
        unit: A rate, as "tokens/s": more is better.
        peer_name: What people call the peer; its version is added.
        packages: Distributions that the peer needs; the first one's version is shown. None: the
            peer is this project in another setting.
        ours: Starts this project's side.
        peer: Starts the peer's side.
        check: (our outputs, the peer's) -> a sentence on what is equal. Raises `Different`.
        tune: Finds the setting in which the peer is quickest and writes it to the directory, in a
            process of its own; None: it has none to find.
        flops: directory -> floating-point operations that one unit of work needs; None: unknown.
        bytes: directory -> bytes that one unit of work must at least read or write; None: unknown.
    """

    name: str
    unit: str
    peer_name: str
    packages: tuple[str, ...]
    ours: Callable[[pathlib.Path], Running]
    peer: Callable[[pathlib.Path], Running]
    check: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], str]
    tune: Callable[[pathlib.Path], None] | None = None
    flops: Callable[[pathlib.Path], float] | None = None
    bytes: Callable[[pathlib.Path], float] | None = None


def per_second(count: float, work: Callable[[], Any]) -> Callable[[], float]:
    """A `Running.run` that does the work, which is so many units of it."""

    def run() -> float:
        begin = time.perf_counter()
        work()
        return count / (time.perf_counter() - begin)

    return run


def check_close(ours: np.ndarray, theirs: np.ndarray, tolerance: float, what: str) -> str:
    """Says by how much two arrays differ at most; raises `Different` if it is over `tolerance`."""
    if ours.shape != theirs.shape:
        raise Different(f"{what}: shapes {ours.shape} and {theirs.shape}")
    difference = float(np.max(np.abs(ours - theirs), initial=0.0))
    if not difference <= tolerance:
        raise Different(f"{what} differ by {difference:.2g}, over {tolerance:.2g}")
    return f"{what} equal to {difference:.1g}"
