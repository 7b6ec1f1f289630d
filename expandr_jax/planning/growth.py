"""Fits how a measured value grows with the data, at a few small scales, and extrapolates it.

A line is fitted to the values. Where they differ by no more than chance, they are constant; where
they rise ever more steeply, they grow worse than linearly, and a square is fitted. n log n counts
as linear: over the scales of a rehearsal its steepness rises by a tenth or two, and what it comes
to is up to a fifth more than is said.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from expandr_jax.errors import UserError

FEWEST_SCALES = 3  # Scales: two points lie on a line, whatever grows.
# What rises as n to this power rises worse than linearly, and so does all that is steeper.
WORSE = 1.3


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a value grows.

    Attributes:
        kind: How it grows with the scale.
        at_full_scale: What it comes to at scale 1, the error added.
        error: By how much the fit may be wrong there.
    """

    kind: Literal["constant", "linear", "worse"]
    at_full_scale: float
    error: float


def fit_growth(
    scales: Sequence[float], values: Sequence[float], by_chance: float = 0.0, share: float = 0.02
) -> Growth:
    """Says how a value grows, and what it is at scale 1.

    The error is that of the steepest line, or square, that passes the values as closely as the one
    that was fitted: it lies below the first by what that one misses at most, above the last by the
    same, and goes on so.

    Args:
        scales: Shares of the full counts, `FEWEST_SCALES` at least, rising.
        values: The value at each, what is there from the start included; 0 or more.
        by_chance: By how much it may differ when the same is done again.
        share: The same as a share of the value; the larger of both counts.

    Raises:
        UserError: Too few scales, or they do not rise.
    """
    x, y = np.asarray(scales, float), np.asarray(values, float)
    if len(x) < FEWEST_SCALES or x[0] <= 0 or (np.diff(x) <= 0).any():
        raise UserError(
            f"scales {', '.join(f'{s:g}' for s in scales)}: expected {FEWEST_SCALES} or more, "
            "rising, all above 0"
        )
    chance = np.maximum(by_chance, share * y)
    if np.ptp(y) <= chance.max():
        # A slope that chance hides is the error.
        return _grown("constant", y.max(), _tilt(np.ptp(y) / 2, x))
    kind, power = ("worse", 2.0) if _is_worse(x, y, chance) else ("linear", 1.0)
    z = x**power
    slope, start = np.polyfit(z, y, 1)
    missed = np.abs(y - start - slope * z).max()
    if slope <= 0:
        return _grown("constant", y.max(), _tilt(missed, z))
    return _grown(kind, start + slope, _tilt(missed, z))


def _grown(kind: Literal["constant", "linear", "worse"], value: float, error: float) -> Growth:
    return Growth(kind, float(value + error), float(error))


def _tilt(missed: float, z: np.ndarray) -> float:
    """What a line is higher by at 1 that differs by `missed` at both ends of what was measured."""
    return missed * (1 + 2 * max(0.0, 1 - z[-1]) / (z[-1] - z[0]))


def _is_worse(x: np.ndarray, y: np.ndarray, chance: np.ndarray) -> bool:
    """Whether the last rise is steeper than the first by more than n ** WORSE and chance do."""
    z = x**WORSE
    allowed = (z[-1] - z[-2]) / (x[-1] - x[-2]) / ((z[1] - z[0]) / (x[1] - x[0]))
    # Both ends of a rise may be off by half of what chance makes.
    steepest = max(0.0, y[1] - y[0] + (chance[0] + chance[1]) / 2) / (x[1] - x[0])
    flattest = (y[-1] - y[-2] - (chance[-2] + chance[-1]) / 2) / (x[-1] - x[-2])
    return bool(flattest > allowed * steepest)
