"""A benchmark's side in a process of its own: `python -m eval.benchmarks.process ...`.

The launcher writes a line for each time that the work is to be done, and gets a line of JSON for
it; what libraries print goes to a log instead.
"""

import contextlib
import importlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import types
from typing import Any

import numpy as np

from eval.benchmarks import THREADS, Comparison
from expandr_jax.errors import UserError
from train.launch import split_processor

PREPARE, TUNE, MACHINE = "prepare", "tune", "machine"  # In the place of a side.
LAST_LINES = 3  # Lines of the log that an error shows.


def benchmark(name: str) -> types.ModuleType:
    """The module of a benchmark: one of this package's, or any by its full name."""
    return importlib.import_module(name if "." in name else f"{__package__}.{name}")


class SideProcess:
    """A process that prepares, measures the machine, or is one side of a row.

    Args:
        directory: Holds the benchmark's inputs; the log is written there too.
        name: Name of the benchmark.
        what: "ours", "peer", PREPARE, TUNE or MACHINE.
        row: Index among the benchmark's rows.
        tree: Another checkout of this project, whose code is run; None: this one's.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        name: str,
        what: str,
        row: int = 0,
        tree: pathlib.Path | None = None,
    ):
        self._log = directory / f"{name}-{row}-{what}.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(directory), name, what, str(row)],
                cwd=tree,  # Python looks for modules there first.
                env={
                    **os.environ,
                    "MKL_NUM_THREADS": str(THREADS),
                    "OMP_NUM_THREADS": str(THREADS),
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",  # It warns at every fork otherwise.
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._name = f"{name}, {what}"

    def answer(self) -> dict[str, Any]:
        """Waits for the next line; UserError if the process fails instead."""
        line = self._process.stdout.readline()
        if not line:
            self.close()
            said = self._log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
            raise UserError(f"{self._name}: failed: {' | '.join(said)}")
        return json.loads(line)

    def measure(self) -> dict[str, Any]:
        """Has the work done once: {"rate", "peak_memory"}."""
        with contextlib.suppress(BrokenPipeError):  # `answer` says why it has ended.
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def outputs_path(directory: pathlib.Path, name: str, what: str, row: int) -> pathlib.Path:
    """The file that a side writes its outputs to."""
    return directory / f"{name}-{row}-{what}.npz"


def peak_memory() -> int:
    """Most bytes that this process has had in memory."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # It may count the parent's from before this program was loaded; there is nothing better here.
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def _machine() -> dict[str, float]:
    """The machine's peaks of matrix products and of reading memory, as far as jax reaches them."""
    import jax
    import jax.numpy as jnp

    from expandr_jax.runtime.chips import best_seconds

    side = 3072
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.float32)
    seconds = best_seconds(jax.jit(jnp.matmul), matrix, matrix)
    numbers = jnp.ones(2**27, jnp.float32)
    return {
        "matmul_flops": 2 * side**3 / seconds,
        "read_bytes": numbers.nbytes / best_seconds(jax.jit(jnp.sum), numbers),
    }


def main() -> None:
    directory, name, what, row = sys.argv[1:]
    directory, row = pathlib.Path(directory), int(row)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

    def say(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    if what == MACHINE:
        say(**_machine())
        return
    module = benchmark(name)
    comparison: Comparison = module.ROWS[row]
    if what == PREPARE:
        module.prepare(directory)
        costs = [
            {"flops": c.flops and c.flops(directory), "bytes": c.bytes and c.bytes(directory)}
            for c in module.ROWS
        ]
        say(costs=costs)
        return
    if what == TUNE:
        comparison.tune(directory)
        say()
        return
    if what == "ours":  # As in all of this project's programs.
        split_processor()
    running = getattr(comparison, what)(directory)
    np.savez(outputs_path(directory, name, what, row), **running.outputs)
    say(setting=running.setting)
    for _ in sys.stdin:
        say(rate=running.run(), peak_memory=peak_memory())


if __name__ == "__main__":
    main()
