"""Step B holds the same whatever the number of texts, but for an index of what is on disk."""

import json
import subprocess
import sys

import pytest

from tests.step_b_memory import CANDIDATES, CHARACTERS

SIZES = (4096, 8192, 16384)  # Two blocks of rewards, and more.


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
    texts = (SIZES[2] - SIZES[1]) * CANDIDATES * CHARACTERS / 1e6
    assert {"expansions", "candidates", "self-answers", "rewards"} <= stages[0].keys()
    for name in ("expansions", "candidates", "self-answers"):  # Rewards: docs/scale.md.
        assert stages[2][name] - stages[1][name] < 0.3 * texts, name
