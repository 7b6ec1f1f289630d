"""The training loop that both models share: batches ahead, checkpoints, exact resume."""

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from expandr_jax.checkpoint import Checkpoints
from expandr_jax.errors import UserError
from expandr_jax.train_state import TrainState
from train.run import Run

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


class Preemption:
    """Turns SIGTERM, the notice that a machine will be taken, into a request to stop."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def _on_signal(self, *_: object) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)


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
        save_every: Steps between saves; the last step is always saved.

    Returns:
        The state after the last step.

    Raises:
        UserError: If a loss or gradient is not finite, naming the last good checkpoint.
    """
    last = first_step + steps
    start = first_step
    restored = checkpoints.restore(state, after=first_step, at_most=last)
    if restored is not None:
        start, state = restored
        if start == last:
            return state
    run.metrics.rewind(phase, round_, start - first_step)
    saved = start if start > first_step else None

    def record(step: int, metrics: dict[str, jax.Array]) -> None:
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            good = (
                "there is none yet" if saved is None else f"step {saved} in {checkpoints.directory}"
            )
            raise UserError(
                f"{phase}, round {round_}, step {step}: {bad[0]} is not finite; lower the learning "
                f"rate. The last good checkpoint: {good}"
            )
        run.metrics.write(phase, round_, step, values)

    with (
        Preemption() as preemption,
        ThreadPoolExecutor(1) as ahead,
        run.progress(f"{phase} steps", steps, start - first_step) as advance,
    ):
        following = ahead.submit(make_batch, start - first_step)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        for number in range(start, last):
            batch = following.result()
            if number + 1 < last:
                following = ahead.submit(make_batch, number + 1 - first_step)
            state, metrics = step_fn(state, batch)
            # The previous step's figures are fetched while this one runs.
            if pending is not None:
                record(*pending)
            pending = (number - first_step, metrics)
            done = number + 1
            if done % save_every == 0 or done == last or preemption.requested:
                record(*pending)
                pending = None
                checkpoints.save(done, state)
                saved = done
            advance(1)
            if preemption.requested and done < last:
                run.console.print(
                    f"stopped by SIGTERM at {phase} step {done - first_step}, saved; "
                    "the same command goes on from here"
                )
                run.close()
                sys.exit(0)
    return state
