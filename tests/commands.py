"""The project's programs, run as a user runs them."""

import json
import os
import pathlib
import subprocess
import sys

from train.metrics_log import COST_FIELDS

ROOT = pathlib.Path(__file__).resolve().parent.parent


def command(module: str, *arguments: str) -> subprocess.Popen:
    """`python -m MODULE ...` from the repository's root, on the devices that it takes by itself."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def start(
    workdir: pathlib.Path, *overrides: str, config: str = "configs/smoke.py"
) -> subprocess.Popen:
    """`train.joint` as a user starts it."""
    return command("train.joint", f"--config={config}", f"--workdir={workdir}", *overrides)


def finish(process: subprocess.Popen) -> str:
    """Waits for a program that must succeed; returns what it printed."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def step_figures(workdir: pathlib.Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a step cost, which differs from run to run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{name: line[name] for name in line if name not in COST_FIELDS} for line in lines]
