"""Step A in pieces: several batches an update, and GradCache beside adapters and remat."""

import dataclasses
import functools
import gc
import itertools
import os
import pathlib
import signal
from typing import Any

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

from configs import base
from expandr_jax.files.records import write_jsonl
from expandr_jax.models.lora import LoraConfig, init_lora, merge_lora
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive import (
    ContrastiveConfig,
    contrastive_gradients,
    contrastive_step,
)
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.sharding import batch_sharding, make_mesh
from expandr_jax.training import stage
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.train_state import TrainState, make_optimizer
from expandr_jax.weights.hf import load_retriever
from tests.commands import step_metrics
from train import retriever as retriever_training

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
WORDS = ["array", "gradient", "loss", "norm", "scale", "shape", "step", "count"]
PAIRS = [(f"{a} {b}", f"the {b} of an {a}") for a in WORDS for b in WORDS if a != b]
CONFIG = ContrastiveConfig(temperature=0.1, query_weight=0.5, normalize="both")


@pytest.fixture(scope="module")
def tiny():
    return load_retriever(TINY)


def batch_of(retriever, first, size):
    """A batch of queries with one expansion each."""
    texts = PAIRS[first : first + size]
    ids = [retriever.token_ids(list(column)) for column in zip(*texts, strict=True)]
    expansions = retriever.token_ids([f"{q} {d}" for q, d in texts])
    examples = [
        ContrastiveExample(query, [expansion], Passage(document, text))
        for query, document, expansion, (_, text) in zip(*ids, expansions, texts, strict=True)
    ]
    return make_batch(examples, retriever.tokenizer.pad_token_id, 1)


def close(ours, theirs, tolerance=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), ours, theirs)


def largest(a, b):
    return max(
        float(np.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def test_an_update_is_that_of_the_mean_gradient_of_its_batches(tiny):
    retriever, params = tiny
    make = functools.partial(make_optimizer, 1e-3, 4, warmup=1, clip_norm=0.5)
    batches = [batch_of(retriever, 8 * i, 8) for i in range(6)]
    gradients = jax.jit(
        functools.partial(contrastive_gradients, retriever=retriever, config=CONFIG)
    )
    plain = make()
    expected, opt_state = params, jax.jit(plain.init)(params)

    @jax.jit
    def updated(params, opt_state, *gradients):
        mean = jax.tree.map(lambda *g: sum(g) / 3, *gradients)
        updates, opt_state = plain.update(mean, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    many = make(accumulation=3)
    step = jax.jit(
        functools.partial(contrastive_step, retriever=retriever, config=CONFIG, optimizer=many)
    )
    state = TrainState.create(params, many)
    for update in range(2):
        part = batches[3 * update : 3 * update + 3]
        each = [gradients(expected, batch)[1] for batch in part]
        before = expected
        expected, opt_state = updated(expected, opt_state, *each)
        for number, batch in enumerate(part):
            if number:
                close(state.params, before, 1e-6)  # Nothing moves before the third.
            state, _ = step(state, batch)
        close(state.params, expected, 1e-5)
    # The first update's rate is 0, by the warm-up; the second's is above the tolerance.
    assert largest(expected, before) > 5e-4
    assert int(state.step) == 6


def test_batches_of_an_update_are_no_negatives_of_each_other(tiny):
    """Unlike micro-batches, which are pieces of one batch."""
    retriever, params = tiny
    gradients = functools.partial(contrastive_gradients, retriever=retriever)
    one = jax.jit(functools.partial(gradients, config=CONFIG))
    large = one(params, batch_of(retriever, 0, 16))[1]
    parts = [one(params, batch_of(retriever, first, 8))[1] for first in (0, 8)]
    mean = jax.tree.map(lambda a, b: (np.asarray(a) + b) / 2, *parts)
    cached = jax.jit(
        functools.partial(gradients, config=dataclasses.replace(CONFIG, micro_batch=8))
    )(params, batch_of(retriever, 0, 16))[1]
    close(cached, large, 1e-5)
    assert largest(mean, large) > 1e-2


def config_of(path):
    config = base.get_config()
    config.data.kind = "triples"
    config.data.path = str(path)
    config.retriever.source = TINY
    config.retriever.max_length = 16
    config.contrastive.update(
        batch_size=16, accumulation=2, epochs=2.0, learning_rate=3e-3, save_every=1
    )
    return config


def train(config, workdir):
    retriever_training.train_on_triples(config, workdir, Console(quiet=True))


@pytest.mark.slow
def test_stopped_between_two_batches_of_an_update_it_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "triples.jsonl"
    write_jsonl(path, [{"query": query, "pos": document} for query, document in PAIRS])
    train(config_of(path), tmp_path / "whole")
    save, fit, saved = Checkpoints.save, stage.fit, []

    def noted(self, step, tree):
        save(self, step, tree)
        saved.append(step)

    def notified(log, state, step_fn, *arguments, **settings):
        calls = itertools.count()

        def step(state, batch):
            if next(calls) == 2:  # In the first batch of the second update.
                os.kill(os.getpid(), signal.SIGTERM)
            return step_fn(state, batch)

        return fit(log, state, step, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", noted)
        patch.setattr(stage, "fit", notified)
        with pytest.raises(SystemExit):
            train(config_of(path), tmp_path / "run")
    assert saved == [2, 3]
    gc.collect()
    train(config_of(path), tmp_path / "run")
    run, whole = tmp_path / "run", tmp_path / "whole"
    name = "export/retriever/model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert step_metrics(run) == step_metrics(whole)
    assert len(step_metrics(run)) == 6  # Three updates of two batches.


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A retriever whose trainable parameters are an adapter's; the base stays as it is."""

    retriever: Retriever
    base: Any
    lora: LoraConfig

    def embed(self, adapter, ids, mask, *, dropout_key=None):
        params = merge_lora(self.base, adapter, self.lora)
        return self.retriever.embed(params, ids, mask, dropout_key=dropout_key)


def with_module(retriever, **settings):
    return dataclasses.replace(retriever, module=retriever.module.clone(**settings))


@pytest.mark.parametrize("case", ["full", pytest.param("lora, full", marks=pytest.mark.slow)])
def test_micro_batches_on_eight_devices_with_remat_or_an_adapter(tiny, case):
    """Against the whole batch at once, on one device, with nothing recomputed."""
    retriever, params = tiny
    trainable, pieces = params, with_module(retriever, remat="full")
    if "lora" in case:
        lora = LoraConfig(rank=2, dropout=0.0)
        adapter = init_lora(jax.random.key(0), params, lora)
        trainable = jax.tree.map(lambda leaf: leaf + 0.02, adapter)
        retriever, pieces = (Adapted(r, params, lora) for r in (retriever, pieces))
    batch = batch_of(tiny[0], 0, 32)
    whole = jax.jit(functools.partial(contrastive_gradients, retriever=retriever, config=CONFIG))
    (loss, _), expected = whole(trainable, batch)
    cached = jax.jit(
        functools.partial(
            contrastive_gradients,
            retriever=pieces,
            config=dataclasses.replace(CONFIG, micro_batch=8),
        ),
        in_shardings=(None, batch_sharding(make_mesh())),
    )
    (found_loss, _), found = cached(trainable, batch)
    np.testing.assert_allclose(found_loss, loss, atol=1e-5)
    close(found, expected, 1e-5)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2
