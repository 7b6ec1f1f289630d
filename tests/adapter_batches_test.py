"""The base's log-probabilities of preference pairs: made once, for these pairs and weights."""

import dataclasses
import functools
import io
import types

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.config import read_config
from expandr_jax.errors import NotFiniteError
from expandr_jax.loading import load_generator_model
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.adapter import AdapterBatches, kept_reference
from expandr_jax.objectives.log_probs import response_log_probs
from expandr_jax.objectives.objective import ObjectiveSettings, adapter_losses
from expandr_jax.objectives.packing import pack
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.runtime.run import Run

DPO, SETTINGS = OBJECTIVES["sigmoid"], ObjectiveSettings(chunk=16)
log_probs_of = jax.jit(
    functools.partial(response_log_probs, responses=2, chunk=16), static_argnums=0
)
LENGTHS = types.SimpleNamespace(prompt_length=32, response_length=9)
ROWS = [
    {"prompt": f"shape {i}?", "chosen": "axis " * (i + 1), "rejected": f"no {i}"} for i in range(11)
]


@pytest.fixture(scope="module")
def models():
    return load_generator_model(read_config(smoke.get_config()))


@pytest.fixture
def run(tmp_path):
    run = Run(
        tmp_path / "run", read_config(smoke.get_config()), Console(file=io.StringIO(), width=300)
    )
    yield run
    run.close()


@pytest.fixture
def made(run):
    """Log-probabilities as a new process has them, and how many batches the base has run."""

    def made(models, pairs):
        batches = AdapterBatches(models, DPO, SETTINGS, 8)
        program, calls = batches.log_probs, []

        def counted(variables, batch):
            assert variables.keys() == {"params"}  # The adapter is off.
            calls.append(batch)
            return program(variables, batch)

        batches.log_probs = counted
        return kept_reference(run.checksums, run.reporter, batches, pairs, "reference"), len(calls)

    return made


def test_it_is_made_once_and_again_only_for_other_pairs_or_weights(models, made):
    pairs, _ = OBJECTIVES["sigmoid"].tokenize(models.generator, ROWS, LENGTHS)
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


def test_what_is_not_finite_is_told_by_its_pair_and_not_kept(models, made, run):
    pairs, _ = OBJECTIVES["sigmoid"].tokenize(models.generator, ROWS, LENGTHS)
    batches = AdapterBatches(models, DPO, SETTINGS, 8)
    program, calls = batches.log_probs, []

    def broken(variables, batch):
        calls.append(batch)
        sums, tokens = program(variables, batch)
        return (sums.at[2, 1].set(np.nan) if len(calls) == 2 else sums), tokens

    batches.log_probs = broken
    with pytest.raises(NotFiniteError, match=r"^10: the log-probability of the reference is not"):
        kept_reference(run.checksums, run.reporter, batches, pairs, "reference")
    assert made(models, pairs)[1] == 2


def test_it_is_the_base_s_of_each_pair_alone(models, made):
    pairs, _ = OBJECTIVES["sigmoid"].tokenize(models.generator, ROWS, LENGTHS)
    module = models.generator.module
    for pair, found in zip(pairs, made(models, pairs)[0], strict=True):
        expected = log_probs_of(module, {"params": models.generator_params}, pack([pair], 0))
        np.testing.assert_allclose(found, expected[0][0], rtol=1e-5)


def test_it_is_that_of_an_adapter_where_one_is_given(models):
    pairs, _ = OBJECTIVES["sigmoid"].tokenize(models.generator, ROWS, LENGTHS)
    module, params = models.generator.module, models.generator_params
    adapter = init_lora(jax.random.key(0), params, module.lora)
    adapter = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.2, adapter)
    plain = AdapterBatches(models, DPO, SETTINGS, 8)
    batches = AdapterBatches(models, DPO, SETTINGS, 8, adapter)
    assert plain.reference_identity(pairs) != batches.reference_identity(pairs)
    found = batches.reference(pairs)
    assert np.abs(found - plain.reference(pairs)).min() > 1e-3
    for pair, own in zip(pairs, found, strict=True):
        variables = {"params": params, "lora": adapter}
        expected = log_probs_of(module, variables, pack([pair], 0))
        np.testing.assert_allclose(own, expected[0][0], rtol=1e-5)


def test_metrics_are_means_over_pairs_whatever_fills_the_last_batch(models):
    """Eleven pairs in batches of eight: the last is filled with five that do not count."""
    pairs, _ = OBJECTIVES["sigmoid"].tokenize(models.generator, ROWS, LENGTHS)
    batches = AdapterBatches(models, DPO, SETTINGS, 8)
    reference = batches.reference(pairs)
    adapter = init_lora(jax.random.key(0), models.generator_params, models.generator.module.lora)
    adapter = jax.tree.map(lambda leaf: leaf + 0.2, adapter)
    found = batches.evaluate(adapter, pairs, reference)
    losses_of = jax.jit(
        functools.partial(
            adapter_losses, objective=DPO, settings=SETTINGS, module=models.generator.module
        )
    )
    alone = []
    for pair, own in zip(pairs, reference, strict=True):
        batch = {**pack([pair], 0), "reference": own[None]}
        loss, metrics = losses_of(adapter, models.generator_params, batch)
        alone.append({"loss": loss[0], **{name: value[0] for name, value in metrics.items()}})
    assert np.std([row["loss"] for row in alone]) > 1e-2
    assert found.keys() == alone[0].keys()
    for name, value in found.items():
        np.testing.assert_allclose(
            value, np.mean([row[name] for row in alone]), rtol=1e-4, atol=1e-5
        )


def test_a_damaged_file_is_made_again(models, run, made):
    pairs, _ = OBJECTIVES["sigmoid"].tokenize(models.generator, ROWS, LENGTHS)
    first, _ = made(models, pairs)
    (path,) = run.path("work").glob("reference-*.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    again, batches = made(models, pairs)
    assert batches == 2
    np.testing.assert_array_equal(again, first)
    assert "reference-" in run.console.file.getvalue()
