"""The training loop that both models share: batches ahead, checkpoints, exact resume."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from expandr_jax.errors import NotFiniteError
from expandr_jax.runtime.stopping import held
from expandr_jax.runtime.telemetry import Contents, Costs, TrainingLog
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.train_state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def fit(
    log: TrainingLog,
    state: TrainState,
    step_fn: Step,
    make_batch: Callable[..., tuple[Any, Contents]],
    *,
    first_step: int,
    steps: int,
    checkpoints: Checkpoints,
    save_every: int,
    prepare: Callable[[], Any] = lambda: None,
    on_policy: bool = False,
) -> TrainState:
    """Runs steps `first_step` to `first_step + steps`, or what a checkpoint leaves of them.

    Args:
        log: Where metrics and progress go.
        state: The state at `first_step`; donated.
        step_fn: A jitted (state, batch) -> (state, metrics) that donates the state.
        make_batch: Step number within this phase -> a batch and what it is made of; called a step
            ahead, in a thread.
        first_step: Number of this phase's first step among the checkpoints.
        steps: Steps of this phase.
        checkpoints: Where to save; a later step found here is restored.
        save_every: Steps between saves, which go on while training does; the last step is always
            saved.
        prepare: Called before the first batch, if there is one to be made.
        on_policy: `make_batch` is called with the number and the state, after the step before and
            in this thread, so that a batch can be made with the weights that it trains.

    Returns:
        The state after the last step, when that is on disk.

    Raises:
        NotFiniteError: If a loss, gradient or parameter is not finite, naming the step and its
            examples.
        Stopped: If a SIGTERM comes; the step is saved.
    """
    last = first_step + steps
    start = first_step
    restored = checkpoints.restore(state, after=first_step, at_most=last)
    if restored is not None:
        start, state = restored
        log.saved(f"step {start} in {checkpoints.directory}")
        if start == last:
            return state
    prepare()
    log.metrics.rewind(log.phase, log.round_, start - first_step)
    costs = Costs(log.peak_flops)
    where = f"{log.phase}, round {log.round_}, step"

    def diverged(step: int, contents: Contents, what: str) -> NotFiniteError:
        checkpoints.wait()
        return NotFiniteError(
            f"{where} {step}: {what}; {contents.named}. Lower the learning rate, or look at these "
            "examples"
        )

    def record(step: int, metrics: dict[str, jax.Array], contents: Contents) -> None:
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise diverged(step, contents, f"{bad[0]} is not finite")
        log.metrics.write(log.phase, log.round_, step, values, costs.of_step(contents))
        median = log.spikes.median_if_spike(values["loss"]) if "loss" in values else None
        if median is not None:
            log.reporter.say(
                f"{where} {step}: the loss is {values['loss']:.4g}, where the median of the "
                f"steps before is {median:.4g}; {contents.named}"
            )

    with (
        held() as notice,
        ThreadPoolExecutor(1) as ahead,
        log.profile.trace,
        log.reporter.progress(f"{log.phase} steps", steps, start - first_step) as advance,
    ):
        following = None if on_policy else ahead.submit(make_batch, start - first_step)
        pending: tuple[int, dict[str, jax.Array], Contents] | None = None
        for number in range(start, last):
            step = number - first_step
            batch, contents = make_batch(step, state) if on_policy else following.result()
            if not on_policy and number + 1 < last:
                following = ahead.submit(make_batch, step + 1)
            log.profile.before_step()
            state, metrics = step_fn(state, batch)
            # The previous step's metrics are fetched while this one runs.
            if pending is not None:
                record(*pending)
            pending = (step, metrics, contents)
            done = number + 1
            if on_policy:  # The next batch waits for this step in any case.
                record(*pending)
                pending = None
            # All stop after the same step, whichever of them had the notice.
            if log.processes.any(notice.requested):
                notice.requested = True
            if done % save_every == 0 or done == last or notice.requested:
                if pending is not None:
                    record(*pending)
                    pending = None
                log.processes.files.push()  # A restart from there needs the lines before it.
                try:
                    checkpoints.save(done, state)
                except NotFiniteError as error:
                    raise diverged(step, contents, str(error)) from None
                log.saved(f"step {done} in {checkpoints.directory}")
            advance(1)
            if notice.requested:
                notice.where = f" at {log.phase} step {step + 1}, saved"
                break
        checkpoints.wait()
        if notice.requested:
            log.stopped()
    return state
