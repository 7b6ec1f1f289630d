"""What trainings of a retriever, a query tower and a re-ranker have in common: their steps.

Each has made its compiled step, its batches and its identity; here they run, are saved and, where
there is a dev collection, evaluated.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from expandr_jax.planning.flops import FROZEN, TRAINING, forward_flops
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import device_put_rows
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.early_stopping import train_with_dev
from expandr_jax.training.loop import fit
from expandr_jax.training.settings import TrainingSettings
from expandr_jax.training.setup import TrainingSetup

Make = Callable[[int], tuple[Mapping[str, Any], Contents]]


def row_flops(module: Any, params: Any, frozen: bool) -> Callable[[int], int]:
    """Length -> operations of a training step's row of so many tokens."""
    passes = FROZEN if frozen else TRAINING
    return functools.cache(lambda length: passes * forward_flops(module, params, 1, length))


def on_devices(run: Run, make: Make, mesh: Mesh, rows: slice, size: int) -> Make:
    """Transfers batches of `size` rows to the mesh where there are several processes.

    Each process has made the rows of its own devices.
    """
    if run.processes.count == 1:
        return make

    def made(step: int) -> tuple[Mapping[str, Any], Contents]:
        arrays, contents = make(step)
        return device_put_rows(arrays, mesh, rows, size), contents

    return made


def train_steps(
    run: Run,
    setup: TrainingSetup,
    start: Any,
    make: Make,
    *,
    name: str,
    identity: Mapping[str, Any],
    settings: TrainingSettings,
    steps: int,
    phase: str | None = None,
    round_: int = 0,
    first: int = 0,
    keep: int | None = None,
    frozen: Sequence[Any] = (),
    key: jax.Array | None = None,
    weights: Callable[[Any], Any] = lambda trained: trained,
    evaluate: Callable[[Any], float] | None = None,
    patience: int = 0,
) -> Any:
    """What is trained, on its devices, after all steps, or when it ranked the dev queries best.

    Args:
        run: The workdir.
        setup: The compiled step.
        start: What is trained, where it lies.
        make: A step's number, from 0 on, to its batch and what that is made of.
        name: What checkpoints and the journal of dev are called.
        identity: What the checkpoints belong to.
        settings: The section of the config: when to save and to evaluate.
        steps: How many, micro-batches counted.
        phase: What metrics call it; None: as the checkpoints are called.
        round_: The round that it is of.
        first: Number of its first step among the checkpoints.
        keep: How many checkpoints stay; None: as the config has it.
        frozen, key: What the step takes beside the state and the batch.
        weights: From what is trained to what is evaluated and returned.
        evaluate: Weights to nDCG@10 on dev; None: the last ones are returned.
        patience: Evaluations without a better one that end it; 0: none do.

    Raises:
        UserError: Training diverges.
    """

    def checkpoints(name: str, **kept: int) -> Checkpoints:
        return Checkpoints(run.checkpoints(name), identity, agree=run.processes.all, **kept)

    every = checkpoints(name, keep=keep or run.config.keep, keep_period=steps)
    log = run.training_log(phase or name, round_)

    # Evaluated in between, it goes on from its checkpoint each time, as after a restart.
    def train(last: int) -> Any:
        state = fit(
            log,
            setup.create(start),
            lambda state, batch: setup.step(state, *frozen, batch, key),
            make,
            first_step=first,
            steps=last,
            checkpoints=every,
            save_every=settings.save_every * settings.accumulation,
        )
        return weights(state.params)

    if evaluate is None:
        return train(steps)
    journal = run.path("work", f"round-{round_}", f"{name}-dev.jsonl")
    return train_with_dev(
        log,
        CommonJournal(journal, run.processes),
        weights(start),
        train,
        evaluate,
        best=checkpoints(f"{name}-best", keep=1),
        steps=steps,
        every=settings.eval_every * settings.accumulation,
        patience=patience,
    )
