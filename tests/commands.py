"""The project's programs, run as a user runs them."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from expandr_jax.data.collect import prepare_data
from expandr_jax.data.training_data import TrainingData
from expandr_jax.runtime.run import Run

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Parameters are spread over two processes.
SPREAD = ("--config.mesh.contrastive=(1,2,1)", "--config.mesh.dpo=(1,2,1)")
# Search is divided where it is exact, and there are several blocks.
EXACT = ("--config.search.backend=exact", "--config.search.exact.block_rows=16")
# Where no number that a program comes to is looked at: it is compiled sooner, and rounds otherwise.
SOON = "--xla_backend_optimization_level=1 --xla_cpu_parallel_codegen_split_count=1"
# Fields of metrics.jsonl with what a step cost; everything else there depends on the config.
COST_FIELDS = (
    "step_seconds", "tokens_per_second", "model_flops_utilisation", "memory_bytes",
    "sampling_seconds", "encoding_seconds", "search_seconds", "rollout_seconds", "update_seconds",
)  # fmt: skip


def command(module: str, *arguments: str, flags: str = "") -> subprocess.Popen:
    """`python -m MODULE ...` from the repository's root; XLA's flags say on what devices.

    Without any, it is on those that it takes by itself.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start(
    workdir: pathlib.Path,
    *overrides: str,
    config: str = "configs/smoke.py",
    module: str = "train.joint",
    flags: str = "",
) -> subprocess.Popen:
    """A trainer as a user starts it."""
    return command(module, f"--config={config}", f"--workdir={workdir}", *overrides, flags=flags)


def start_processes(
    workdir: pathlib.Path,
    count: int,
    *overrides: str,
    of_one: dict[int, tuple[str, ...]] | None = None,
    **program: str,
) -> list[subprocess.Popen]:
    """A trainer as several processes on this machine, each with a device, or as `flags` say.

    `of_one` has further arguments of single processes, by their numbers; `program` is as of
    `start`.
    """
    together = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={count}"]
    return [
        start(
            workdir, *overrides, *together, f"--process={i}", *(of_one or {}).get(i, ()), **program
        )
        for i in range(count)
    ]


def free_port() -> int:
    """One of this machine that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def finish(process: subprocess.Popen) -> str:
    """Waits for a program that must succeed; returns what it printed."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def step_metrics(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a step cost, which differs from run to run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name not in COST_FIELDS} for line in lines]


def ended(processes: list, timeout: float = 300) -> list[str]:
    """What processes printed, when all have ended."""
    return [process.communicate(timeout=timeout)[0] for process in processes]


def until(processes: list, condition: Callable[[], bool]) -> None:
    """Waits for something that processes are to do."""
    limit = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.02)


def error_of(output: str) -> str:
    """The one line that a program ended with."""
    assert "Traceback" not in output, output
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return message


def data_of(run: Run) -> TrainingData:
    """The data of a run, as train.joint prepares them."""
    return prepare_data(run.config.data, run.checksums, run.reporter)
