"""The skeleton of a trained stage: its steps run, are saved and, with dev queries, evaluated.

Who trains something has made its compiled step, its batches and its identity.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import device_put_rows
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.early_stopping import train_with_dev
from expandr_jax.training.loop import fit
from expandr_jax.training.settings import TrainingSettings
from expandr_jax.training.setup import TrainingSetup

Make = Callable[[int], tuple[Mapping[str, Any], Contents]]


def on_devices(processes: Processes, make: Make, mesh: Mesh, rows: slice, size: int) -> Make:
    """Transfers batches of `size` rows to the mesh where there are several processes.

    Each process has made the rows of its own devices.
    """
    if processes.count == 1:
        return make

    def made(step: int) -> tuple[Mapping[str, Any], Contents]:
        arrays, contents = make(step)
        return device_put_rows(arrays, mesh, rows, size), contents

    return made


def stage_trainer(
    stage: TrainedStage,
    setup: TrainingSetup,
    start: Any,
    make: Make,
    *,
    identity: Mapping[str, Any],
    older: Callable[[], Mapping[str, Any]] = dict,
    prepare: Callable[[], Any] = lambda: None,
    settings: TrainingSettings,
    steps: int,
    first: int = 0,
    frozen: Sequence[Any] = (),
    key: jax.Array | None = None,
) -> Callable[[int], Any]:
    """Gives what is trained after so many of a stage's steps, on its devices.

    Each call goes on from the last checkpoint, as a restart does: between two of them what is
    trained may be evaluated.

    Args:
        stage: Where it is recorded and kept.
        setup: The compiled step.
        start: What is trained, where it lies.
        make: A step's number, from 0 on, to its batch and what that is made of.
        identity, older: What the checkpoints belong to; see `Checkpoints`.
        prepare: Called before the first batch is made, if one is.
        settings: The section of the config: when to save.
        steps: How many, micro-batches counted.
        first: Number of its first step among the checkpoints.
        frozen, key: What the step takes beside the state and the batch.
    """
    log = stage.log
    checkpoints = Checkpoints(
        stage.checkpoints,
        identity,
        older=older,
        keep=stage.keep,
        keep_period=steps,
        agree=log.processes.all,
    )

    def train(last: int) -> Any:
        return fit(
            log,
            setup.create(start),
            lambda state, batch: setup.step(state, *frozen, batch, key),
            make,
            first_step=first,
            steps=last,
            checkpoints=checkpoints,
            save_every=settings.save_every * settings.accumulation,
            prepare=prepare,
        ).params

    return train


def train_stage(
    stage: TrainedStage,
    setup: TrainingSetup,
    start: Any,
    make: Make,
    *,
    identity: Mapping[str, Any],
    older: Callable[[], Mapping[str, Any]] = dict,
    prepare: Callable[[], Any] = lambda: None,
    settings: TrainingSettings,
    steps: int,
    weights: Callable[[Any], Any] = lambda trained: trained,
    evaluate: Callable[[Any], float] | None = None,
    patience: int = 0,
    **how: Any,
) -> Any:
    """What is trained, on its devices, after all steps, or when it ranked the dev queries best.

    Args:
        stage, setup, start, make, identity, older, prepare, settings, steps: As of
            `stage_trainer`; the settings also say when to evaluate.
        weights: From what is trained to what is evaluated and returned.
        evaluate: Weights to nDCG@10 on dev; None: the last ones are returned.
        patience: Evaluations without a better one that end it; 0: none do.
        **how: The rest, as of `stage_trainer`.

    Raises:
        UserError: Training diverges.
    """
    told = {"identity": identity, "older": older}
    trainer = stage_trainer(
        stage, setup, start, make, **told, prepare=prepare, settings=settings, steps=steps, **how
    )
    if evaluate is None:
        return weights(trainer(steps))
    processes = stage.log.processes
    journal = CommonJournal(stage.journal, processes)
    if not journal.rows:  # What is wrong with the examples is told before dev is ranked.
        prepare()
    return train_with_dev(
        stage.log,
        journal,
        weights(start),
        lambda last: weights(trainer(last)),
        evaluate,
        best=Checkpoints(stage.best, **told, keep=1, agree=processes.all),
        steps=steps,
        every=settings.eval_every * settings.accumulation,
        patience=patience,
    )
