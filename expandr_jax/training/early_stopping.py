"""Training watched on dev: the best weights are kept, and it stops when nothing is gained."""

from collections.abc import Callable
from typing import Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.telemetry import TrainingLog
from expandr_jax.training.checkpoint import Checkpoints


def train_with_dev(
    log: TrainingLog,
    journal: CommonJournal,
    params: Any,
    train: Callable[[int], Any],
    evaluate: Callable[[Any], float],
    *,
    best: Checkpoints,
    steps: int,
    every: int,
    patience: int,
) -> Any:
    """Trains until the dev measure stops rising, or to the end.

    Args:
        log: Where metrics and progress go; evaluations have "-dev" behind the phase's name.
        journal: Gets a row for each evaluation.
        params: Weights at the start, which are evaluated, too.
        train: Step of this round -> weights there; goes on from where it was.
        evaluate: Weights -> dev measure.
        best: Where the best weights are saved.
        steps: The last step.
        every: Steps between evaluations; the last step is always evaluated. 0: only that one.
        patience: Evaluations without a gain after which training stops; 0: never.

    Returns:
        The weights of the highest measure, the earliest where several are equal.

    Raises:
        UserError: If they cannot be read back.
    """
    phase, round_ = f"{log.phase}-dev", log.round_
    stops = [*range(0, steps, every or steps), steps]
    for step in stops[len(journal.rows) :]:
        before = [row[CHOSEN_BY] for row in journal.rows]
        waited = len(before) - 1 - int(np.argmax(before)) if before else 0
        if journal.finished or (patience and waited >= patience):
            break
        weights = train(step) if step else params
        value = evaluate(weights)
        number = round_ * steps + step
        # After a kill before the row was written, the weights may be there already.
        if value > max(before, default=-1.0) and _read(best, params, number) is None:
            best.save(number, weights)
            best.wait()  # The row below says that they are there.
        journal.append([{"step": step, CHOSEN_BY: value}])
        log.metrics.rewind(phase, round_, step)
        log.metrics.write(phase, round_, step, {CHOSEN_BY: value})
        log.reporter.say(f"step {step} of {steps}: dev nDCG@10 {value:.4f}")
    if not journal.finished:
        journal.finish()
    values = [row[CHOSEN_BY] for row in journal.rows]
    step = journal.rows[int(np.argmax(values))]["step"]
    weights = _read(best, params, round_ * steps + step)
    if weights is None:
        raise UserError(f"{best.directory}: the best weights are not there; use a new --workdir")
    log.reporter.say(f"best on dev: step {step}, nDCG@10 {max(values):.4f}")
    return weights


def _read(checkpoints: Checkpoints, template: Any, step: int) -> Any | None:
    restored = checkpoints.restore(template, after=step - 1, at_most=step)
    return None if restored is None else restored[1]
