"""Step B holds the same whatever the number of texts, but for an index of what is on disk."""

import json
import subprocess
import sys

import pytest

from tests.step_b_memory import CANDIDATES, CHARACTERS

SIZES = (8192, 32768)  # Four blocks of rewards, and sixteen.


@pytest.mark.slow
def test_memory_does_not_grow_with_texts():
    stages = []
    for size in SIZES:
        command = [sys.executable, "-m", "tests.step_b_memory", str(size)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        stages.append(json.loads(found.stdout.splitlines()[-1]))
    print()
    for name in stages[0]:
        print(f"{name}: {', '.join(str(stage[name]) for stage in stages)} MB at {SIZES} queries")
    texts = (SIZES[1] - SIZES[0]) * CANDIDATES * CHARACTERS / 1e6
    for name in ("expansions", "candidates", "self-answers", "rewards"):
        assert stages[1][name] - stages[0][name] < 0.15 * texts, name
