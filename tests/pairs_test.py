"""The base's log-probabilities of preference pairs: made once, for these pairs and weights."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.preference import DPOConfig, pack, response_log_probs
from train.models import load_generator_model
from train.pairs import PairBatches, tokenize_pairs
from train.run import Run

LENGTHS = {"prompt_length": 32, "response_length": 9}
ROWS = [
    {"prompt": f"shape {i}?", "chosen": "axis " * (i + 1), "rejected": f"no {i}"} for i in range(11)
]


@pytest.fixture(scope="module")
def models():
    return load_generator_model(smoke.get_config())


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", smoke.get_config(), Console(file=io.StringIO(), width=300))
    yield run
    run.close()


@pytest.fixture
def made(run):
    """Log-probabilities as a new process has them, and how many batches the base has run."""

    def made(models, pairs):
        batches = PairBatches(run, models, 8, DPOConfig(chunk=16))
        program, calls = batches._log_probs, []

        def counted(variables, batch):
            assert variables.keys() == {"params"}  # The adapter is off.
            calls.append(batch)
            return program(variables, batch)

        batches._log_probs = counted
        return batches.reference(pairs, "reference"), len(calls)

    return made


def test_it_is_made_once_and_again_only_for_other_pairs_or_weights(models, made):
    pairs, _ = tokenize_pairs(models.generator, ROWS, **LENGTHS)
    first, batches = made(models, pairs)
    assert batches == 2
    again, batches = made(models, pairs)
    assert batches == 0
    np.testing.assert_array_equal(again, first)
    part, batches = made(models, pairs[:8])
    assert batches == 1
    np.testing.assert_allclose(part, first[:8], atol=1e-5)
    assert made(models, pairs[::-1])[1] == 2
    twice = jax.tree.map(
        lambda leaf: jax.device_put(2 * np.asarray(leaf), leaf.sharding), models.generator_params
    )
    other = dataclasses.replace(models, generator_params=twice, generator_hash="of others")
    changed, batches = made(other, pairs)
    assert batches == 2
    assert np.abs(changed - first).min() > 1e-3
    # Those of the first weights are still there.
    assert made(models, pairs)[1] == 0


def test_it_is_the_base_s_of_each_pair_alone(models, made):
    pairs, _ = tokenize_pairs(models.generator, ROWS, **LENGTHS)
    module = models.generator.module
    for pair, found in zip(pairs, made(models, pairs)[0], strict=True):
        expected = response_log_probs(
            module, {"params": models.generator_params}, pack([pair], 0), chunk=16
        )
        np.testing.assert_allclose(found, np.ravel(expected[:2]), rtol=1e-5)


def test_a_damaged_file_is_made_again(models, run, made):
    pairs, _ = tokenize_pairs(models.generator, ROWS, **LENGTHS)
    first, _ = made(models, pairs)
    (path,) = run.path("work").glob("reference-*.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    again, batches = made(models, pairs)
    assert batches == 2
    np.testing.assert_array_equal(again, first)
    assert "reference-" in run.console.file.getvalue()
