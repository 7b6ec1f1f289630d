"""The training loop that both models share: batches ahead, checkpoints, exact resume."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from expandr_jax.errors import NotFiniteError
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.stopping import held
from expandr_jax.runtime.telemetry import Contents, Costs
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.train_state import TrainState

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


def fit(
    run: Run,
    phase: str,
    round_: int,
    state: TrainState,
    step_fn: Step,
    make_batch: Callable[[int], Any],
    *,
    first_step: int,
    steps: int,
    checkpoints: Checkpoints,
    save_every: int,
    contents: Callable[[int], Contents] = lambda _: Contents(()),
) -> TrainState:
    """Runs steps `first_step` to `first_step + steps`, or what a checkpoint leaves of them.

    Args:
        run: Where metrics and progress go.
        phase: Name in metrics.jsonl.
        round_: Round in metrics.jsonl.
        state: The state at `first_step`; donated.
        step_fn: A jitted (state, batch) -> (state, metrics) that donates the state.
        make_batch: Step number within this phase -> a batch; called ahead, in a thread.
        first_step: Number of this phase's first step among the checkpoints.
        steps: Steps of this phase.
        checkpoints: Where to save; a later step found here is restored.
        save_every: Steps between saves, which go on while training does; the last step is always
            saved.
        contents: Step number within this phase -> what its batch is made of.

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
        run.last_good = f"step {start} in {checkpoints.directory}"
        if start == last:
            return state
    run.metrics.rewind(phase, round_, start - first_step)
    costs, (spikes, profile) = Costs(run.config), run.watch(phase, round_)
    where = f"{phase}, round {round_}, step"

    def diverged(step: int, made_of: Contents, what: str) -> NotFiniteError:
        checkpoints.wait()
        return NotFiniteError(
            f"{where} {step}: {what}; {made_of.named}. Lower the learning rate, or look at these "
            "examples"
        )

    def record(step: int, metrics: dict[str, jax.Array], made_of: Contents) -> None:
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise diverged(step, made_of, f"{bad[0]} is not finite")
        run.metrics.write(phase, round_, step, values, costs.of_step(made_of))
        median = spikes.median_if_spike(values["loss"]) if "loss" in values else None
        if median is not None:
            run.console.print(
                f"  {where} {step}: the loss is {values['loss']:.4g}, where the median of the "
                f"steps before is {median:.4g}; {made_of.named}",
                markup=False,
            )

    def prepare(step: int) -> tuple[Any, Contents]:
        return make_batch(step), contents(step)

    with (
        held() as notice,
        ThreadPoolExecutor(1) as ahead,
        profile.watch(),
        run.progress(f"{phase} steps", steps, start - first_step) as advance,
    ):
        following = ahead.submit(prepare, start - first_step)
        pending: tuple[int, dict[str, jax.Array], Contents] | None = None
        for number in range(start, last):
            batch, made_of = following.result()
            if number + 1 < last:
                following = ahead.submit(prepare, number + 1 - first_step)
            profile.before_step()
            state, metrics = step_fn(state, batch)
            # The previous step's figures are fetched while this one runs.
            if pending is not None:
                record(*pending)
            pending = (number - first_step, metrics, made_of)
            done = number + 1
            # All stop after the same step, whichever of them had the notice.
            if run.processes.any(notice.requested):
                notice.requested = True
            if done % save_every == 0 or done == last or notice.requested:
                record(*pending)
                pending = None
                run.processes.files.push()  # A restart from there needs the lines before it.
                try:
                    checkpoints.save(done, state)
                except NotFiniteError as error:
                    raise diverged(number - first_step, made_of, str(error)) from None
                run.last_good = f"step {done} in {checkpoints.directory}"
            advance(1)
            if notice.requested:
                notice.where = f" at {phase} step {done - first_step}, saved"
                break
        checkpoints.wait()
        if notice.requested:
            run.close()
    return state
