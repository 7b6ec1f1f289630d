"""Step B holds the same whatever the number of texts, but for an index of what is on disk."""

import json
import os
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
        alone = {**os.environ, "XLA_FLAGS": ""}  # As a user's, without the tests' eight devices.
        found = subprocess.run(command, check=True, capture_output=True, text=True, env=alone)
        stages.append(json.loads(found.stdout.splitlines()[-1]))
    print()
    for name in stages[0]:
        print(f"{name}: {', '.join(str(stage[name]) for stage in stages)} MB at {SIZES} queries")
    texts = (SIZES[1] - SIZES[0]) * CANDIDATES * CHARACTERS / 1e6
    assert {"expansions", "candidates", "self-answers", "rewards"} <= stages[0].keys()
    for name in ("expansions", "candidates", "self-answers"):  # Rewards: docs/scale.md.
        assert stages[1][name] - stages[0][name] < 0.15 * texts, name
