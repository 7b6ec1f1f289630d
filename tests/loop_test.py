"""The training loop: resumed it is exact, and what goes wrong is named."""

import gc
import io
import itertools
import json
import os
import pathlib
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from configs import base, smoke
from expandr_jax.config import read_config
from expandr_jax.errors import NotFiniteError
from expandr_jax.files.records import write_jsonl
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.stopping import Stopped
from expandr_jax.runtime.telemetry import Contents, SpikeWatch, TrainingLog
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.loop import fit
from expandr_jax.training.train_state import TrainState
from tests.commands import step_metrics
from train.generator import train_adapter
from train.retriever import train_on_triples

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
OPTIMIZER = optax.adam(0.1)
STEPS = 8


@jax.jit
def step(state, batch):
    """Least squares."""
    x, y = batch

    def loss(w):
        return jnp.mean(jnp.square(x @ w - y))

    value, grads = jax.value_and_grad(loss)(state.params["w"])
    return state.apply({"w": grads}, OPTIMIZER), {"loss": value}


def batch(number, bad=None):
    draws = np.random.default_rng(number)
    x = draws.normal(size=(16, 4)).astype(np.float32)
    if number == bad:
        x[3, 2] = np.inf
    return x, (x @ np.arange(4)).astype(np.float32)


def contents(number):
    return Contents([f"q{number}a", f"q{number}b"], 32)


def with_contents(make_batch):
    return lambda number: (make_batch(number), contents(number))


def opened(workdir, **log):
    config = smoke.get_config()
    config.log.update(log)
    return Run(workdir, read_config(config), Console(file=io.StringIO(), width=1000))


def train(workdir, make_batch=batch, parts=(STEPS,), **log):
    """Trains the toy; `parts`: the steps that single calls end with."""
    run = opened(workdir, **log)
    checkpoints = Checkpoints(workdir / "checkpoints" / "toy", {})
    try:
        with run.phase("toy"):
            log = run.training_log("toy", 0)
            for last in parts:
                state = TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER)
                state = fit(
                    log, state, step, with_contents(make_batch),
                    first_step=0, steps=last, checkpoints=checkpoints, save_every=3,
                )  # fmt: skip
            return state
    finally:
        checkpoints.wait()
        run.close()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("last", range(1, STEPS))
def test_killed_after_any_step_it_ends_with_the_same_bits(tmp_path, last):
    def until_killed(number):
        if number == last:
            raise Killed
        return batch(number)

    whole = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "run", until_killed)
    saved = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints" / "toy").glob("[0-9]*"))
    # Batches are made one step ahead, so the step before is the last to be done.
    assert max(saved, default=0) >= (last - 1) // 3 * 3
    resumed = train(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert step_metrics(tmp_path / "run") == step_metrics(tmp_path / "whole")


def test_a_sigterm_saves_the_step_and_says_so(tmp_path):
    def notified(number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(number)

    with pytest.raises(Stopped) as stopped:
        train(tmp_path / "run", notified)
    (latest,) = [p.name for p in (tmp_path / "run/checkpoints/toy").glob("[45]")]
    assert f"at toy step {latest}, saved" in stopped.value.message
    whole, resumed = train(tmp_path / "whole"), train(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_what_is_not_finite_stops_it_with_step_examples_and_checkpoint(tmp_path):
    with pytest.raises(NotFiniteError) as raised:
        train(tmp_path / "run", lambda number: batch(number, bad=4))
    message = str(raised.value)
    assert "toy, round 0, step 4: loss is not finite; examples q4a, q4b" in message
    assert f"The last good checkpoint: step 3 in {tmp_path / 'run'}" in message
    assert "\n" not in message
    assert [line["step"] for line in step_metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def overflow(state, batch):
        state, metrics = step(state, batch)
        w = jnp.where(state.step == 6, jnp.inf, state.params["w"])
        return state.replace(params={"w": w}), metrics

    run = opened(tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints" / "toy", {})
    with (
        pytest.raises(NotFiniteError, match=r"step 5.*\['w'\].*q5a.*checkpoint: step 3"),
        run.phase("toy"),
    ):
        fit(
            run.training_log("toy", 0), TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER),
            overflow, with_contents(batch), first_step=0, steps=STEPS, checkpoints=checkpoints,
            save_every=3,
        )  # fmt: skip
    run.close()


def test_a_loss_far_above_those_before_is_reported():
    draws = np.random.default_rng(0)
    watch = SpikeWatch()
    for number in range(200):  # Falling, with noise: no spikes.
        assert watch.median_if_spike(3 * 0.99**number + 0.1 * draws.normal()) is None
    assert watch.median_if_spike(4.0) == pytest.approx(3 * 0.99**175, abs=0.2)
    assert watch.median_if_spike(0.4) is None
    assert SpikeWatch().median_if_spike(1e9) is None  # Nothing to compare it with.


PARTS = [(STEPS,), range(2, STEPS + 1, 2)]  # The latter as with evaluations in between.


@pytest.mark.parametrize("parts", PARTS)
def test_a_spike_is_reported_with_its_step_and_examples(tmp_path, monkeypatch, parts):
    monkeypatch.setattr("expandr_jax.runtime.telemetry.FEWEST_LOSSES", 3)
    run = opened(tmp_path / "run")
    monkeypatch.setattr("tests.loop_test.opened", lambda *_, **__: run)

    def spiky(number):
        x, y = batch(number)
        return x, y * (1000 if number == 5 else 1)

    train(tmp_path / "run", spiky, parts)
    (line,) = [line for line in run.console.file.getvalue().splitlines() if "median" in line]
    assert "toy, round 0, step 5: the loss is " in line
    assert line.endswith("examples q5a, q5b")


@pytest.mark.parametrize("parts", PARTS)
def test_a_trace_of_some_steps_is_written_once_where_asked(tmp_path, parts):
    train(tmp_path / "run", parts=parts, profile_steps=2)
    (_,) = (tmp_path / "run" / "profile" / "toy-round-0").rglob("*.xplane.pb")
    train(tmp_path / "other")
    assert not (tmp_path / "other" / "profile").exists()


def test_utilisation_is_of_the_peak_that_the_config_gives(tmp_path, monkeypatch):
    given = Contents(["a"], 10, flops=1e6)
    monkeypatch.setattr("tests.loop_test.contents", lambda _: given)
    train(tmp_path / "run", peak_flops=1e9)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        speed = line["tokens_per_second"] / 10 * 1e6 / (1e9 * jax.device_count())
        assert line["model_flops_utilisation"] == pytest.approx(speed)


def trained_on_policy(directory, steps, until=None):
    """Trains on targets that each step makes of the weights of the one before, without a Run."""
    seen = []

    def make_batch(number, state):
        w = np.asarray(state.params["w"])
        seen.append((number, threading.current_thread(), w))
        if number == until:
            raise Killed
        x, y = batch(number)
        return (x, y + x @ w / 2), Contents([str(number)])

    checkpoints = Checkpoints(directory, {})
    try:
        state = fit(
            TrainingLog("toy"), TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER), step,
            make_batch, first_step=0, steps=steps, checkpoints=checkpoints, save_every=3,
            on_policy=True,
        )  # fmt: skip
    finally:
        checkpoints.wait()
    return state, seen


def test_batches_made_of_the_state_are_those_of_the_weights_just_trained(tmp_path):
    state, seen = trained_on_policy(tmp_path / "whole", STEPS)
    by_hand, w = TrainState.create({"w": jnp.zeros(4)}, OPTIMIZER), np.zeros(4, np.float32)
    for number, (given, thread, weights) in enumerate(seen):
        assert (given, thread) == (number, threading.current_thread())
        np.testing.assert_array_equal(weights, w)
        x, y = batch(number)
        by_hand, _ = step(by_hand, (x, y + x @ w / 2))
        w = np.asarray(by_hand.params["w"])
    np.testing.assert_array_equal(state.params["w"], w)
    with pytest.raises(Killed):
        trained_on_policy(tmp_path / "run", STEPS, until=5)
    resumed, seen = trained_on_policy(tmp_path / "run", STEPS)
    assert [number for number, _, _ in seen] == [3, 4, 5, 6, 7]
    np.testing.assert_array_equal(resumed.params["w"], w)


def killed_after_two_steps(monkeypatch, function, *arguments):
    """Calls a trainer that ends, as by a kill, when the second step's checkpoint is there."""
    save = Checkpoints.save

    def until_killed(self, step, tree):
        save(self, step, tree)
        self.wait()
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", until_killed)
        with pytest.raises(Killed):
            function(*arguments)
    gc.collect()  # Closes the lock, as the end of its process would.


@pytest.mark.slow
def test_on_another_mesh_it_goes_on_to_the_same_adapter(tmp_path, monkeypatch):
    """DPO: 8 x 1 x 1 devices, then 2 x 2 x 2, with dropout."""
    words = [a + b for a, b in itertools.product("abcd", "uvwx")]
    rows = [{"prompt": f"{w}?", "chosen": f"{w} {w}", "rejected": w[::-1]} for w in words]
    write_jsonl(tmp_path / "pairs.jsonl", rows)

    def config(**mesh):
        config = smoke.get_config()
        config.data.kind, config.data.path = "preferences", str(tmp_path / "pairs.jsonl")
        config.dpo.update(batch_size=8, epochs=2.0, dev_share=0.0, save_every=1)
        config.mesh.update(mesh)
        return config

    def weights(name):
        return load_file(tmp_path / name / "export" / "adapter" / "adapter_model.safetensors")

    quiet = Console(quiet=True)
    train_adapter(config(data=8), tmp_path / "whole", quiet)
    killed_after_two_steps(monkeypatch, train_adapter, config(data=8), tmp_path / "run", quiet)
    train_adapter(config(data=2, fsdp=2, tensor=2), tmp_path / "run", quiet)
    whole, resumed = weights("whole"), weights("run")
    for name, value in whole.items():
        np.testing.assert_allclose(resumed[name], value, atol=1e-5, err_msg=name)
    assert all(np.abs(value).max() > 1e-3 for value in whole.values())  # A new one's B is 0.
    assert len(step_metrics(tmp_path / "run")) == 4


@pytest.mark.slow
def test_on_another_mesh_it_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """The retriever's training: 8 x 1 x 1 devices, then 1 x 4 x 2."""
    words = [a + b for a, b in itertools.product("abcdefgh", "uvwx")]
    write_jsonl(tmp_path / "data.jsonl", [{"query": w, "pos": f"{w} {w[::-1]}"} for w in words])

    def config(**mesh):
        config = base.get_config()
        config.data.kind, config.data.path = "triples", str(tmp_path / "data.jsonl")
        config.retriever.source = TINY
        config.retriever.max_length = 16
        config.contrastive.update(batch_size=16, epochs=2.0, learning_rate=1e-3, save_every=1)
        config.mesh.update(mesh)
        config.log.peak_flops = 1e9
        return config

    def weights(name):
        return load_file(tmp_path / name / "export" / "retriever" / "model.safetensors")

    quiet = Console(quiet=True)
    train_on_triples(config(data=8), tmp_path / "whole", quiet)
    killed_after_two_steps(monkeypatch, train_on_triples, config(data=8), tmp_path / "run", quiet)
    train_on_triples(config(data=1, fsdp=4, tensor=2), tmp_path / "run", quiet)
    before, whole, resumed = (
        load_file(f"{TINY}/model.safetensors"),
        weights("whole"),
        weights("run"),
    )
    for name, value in whole.items():
        np.testing.assert_allclose(resumed[name], value, atol=1e-5, err_msg=name)
    assert any(np.abs(value - before[name]).max() > 1e-3 for name, value in whole.items())
    # Each weight of two layers, 4 x 32 x 32 and 2 x 32 x 64, multiplies and adds for every token;
    # the backward pass costs two forward ones. Attention is little at this length.
    least = 3 * 2 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        used = line["model_flops_utilisation"] * 1e9 * jax.device_count()
        assert 1 < used / (line["tokens_per_second"] * least) < 1.3
