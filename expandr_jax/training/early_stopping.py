"""Early stopping on dev: keeps the best weights, and stops when the score stops rising."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.telemetry import TrainingLog
from expandr_jax.training.checkpoint import Checkpoints

SHOWN_METRICS = (CHOSEN_BY, "loss", "accuracy", "margin")  # Metrics on dev that people are told.


def watch_dev(
    log: TrainingLog,
    journal: CommonJournal,
    train: Callable[[int], Any],
    evaluate: Callable[[Any], dict[str, float]],
    keep: Callable[[int, Any], None],
    *,
    stops: Sequence[int],
    score: Callable[[Mapping[str, float]], float],
    patience: int = 0,
) -> dict[str, float]:
    """Trains until the score on dev stops rising, or to the last stop.

    A restart evaluates no step twice, and comes to the same best weights.

    Args:
        log: Where metrics and progress go; evaluations have "-dev" behind the phase's name.
        journal: Gets a row for each evaluation.
        train: Step of this round -> weights there; goes on from where it was.
        evaluate: Weights -> metrics on dev.
        keep: Takes a step and its weights, where they have the highest score so far.
        stops: The steps that are evaluated.
        score: Metrics -> what is to be high.
        patience: Evaluations without a gain after which training stops; 0: never.

    Returns:
        Step and metrics of the highest score, the earliest where several are equal.

    Raises:
        NotFiniteError: A metric is not finite.
    """
    phase, round_ = f"{log.phase}-dev", log.round_
    for step in stops[len(journal.rows) :]:
        before = [score(row) for row in journal.rows]
        waited = len(before) - 1 - int(np.argmax(before)) if before else 0
        if journal.finished or (patience and waited >= patience):
            break
        weights = train(step)
        metrics = evaluate(weights)
        if not all(map(math.isfinite, metrics.values())):
            raise NotFiniteError(
                f"{log.phase}, round {round_}, step {step}: a metric on dev is not finite; lower "
                "the learning rate"
            )
        if score(metrics) > max(before, default=-math.inf):
            keep(step, weights)
        log.metrics.rewind(phase, round_, step)
        log.metrics.write(phase, round_, step, metrics)
        # Last, so that a kill before it has all of this done again.
        journal.append([{"step": step, **metrics}])
        shown = ", ".join(
            f"{name} {metrics[name]:.4f}" for name in SHOWN_METRICS if name in metrics
        )
        log.reporter.say(f"step {step} of {stops[-1]}: dev {shown}")
    if not journal.finished:
        journal.finish()
    return max(journal.rows, key=score)


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
    """The weights that `watch_dev` finds best for ranking the dev queries.

    Args:
        log, journal, train, patience: As for `watch_dev`.
        params: Weights at the start, which are evaluated, too.
        evaluate: Weights -> `CHOSEN_BY` on dev.
        best: Where the best weights are saved.
        steps: The last step.
        every: Steps between evaluations; the last step is always evaluated. 0: only that one.

    Raises:
        UserError: If they cannot be read back.
    """

    def read(step: int) -> Any | None:
        number = log.round_ * steps + step
        restored = best.restore(params, after=number - 1, at_most=number)
        return None if restored is None else restored[1]

    def keep(step: int, weights: Any) -> None:
        # After a kill before the journal had their row, the weights may be there already.
        if read(step) is None:
            best.save(log.round_ * steps + step, weights)
            best.wait()

    row = watch_dev(
        log,
        journal,
        lambda step: train(step) if step else params,
        lambda weights: {CHOSEN_BY: evaluate(weights)},
        keep,
        stops=[*range(0, steps, every or steps), steps],
        score=operator.itemgetter(CHOSEN_BY),
        patience=patience,
    )
    weights = read(row["step"])
    if weights is None:
        raise UserError(f"{best.directory}: the best weights are not there; use a new --workdir")
    log.reporter.say(f"best on dev: step {row['step']}, nDCG@10 {row[CHOSEN_BY]:.4f}")
    return weights
