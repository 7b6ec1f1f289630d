"""Gates: small models that say of each query whether expanding it helps.

A gate is a logistic regression on what the query's searches tell (`ranking.gate_features`). It is
fitted on dev queries, whose label is whether expanding gained there, and which count by how much
it gained or lost. Its file has numbers alone.

SciPy, which BM25 needs anyway, minimises the loss: it is convex and has some twenty weights, for
which scikit-learn would be one more dependency. A test compares both.
"""

import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.ranking.gate_features import PlainSearch, features_before

FOLDS = 5
PENALTY = 10.0  # As much as ten queries say: of few dev queries little is learned.
TRIED_SHARES = 10  # Thresholds that are tried expand so many tenths of the dev queries.
ALWAYS, NEVER = 0.0, 1.0  # Thresholds. A probability is never NEVER.
_MOST = 1 - 1e-9
_NUMBERS = "intercept", "threshold", "share"
_LISTS = "means", "deviations", "weights"

Features = Mapping[str, Mapping[str, float]]  # Query -> feature -> value.


@dataclasses.dataclass(frozen=True)
class Gate:
    """A fitted gate; a query is expanded if its probability is `threshold` or more.

    Attributes:
        features: Names of what it reads.
        means, deviations: By which each is standardised.
        weights, intercept: They give the log-odds that expanding helps.
        threshold: `ALWAYS` and `NEVER` included.
        share: How many of the dev queries are expanded, by out-of-fold probabilities.
        dev: What it was fitted on: "queries", and mean nDCG@10 there, "never", "always" and
            "gated", the last with thresholds chosen without the query.
    """

    features: tuple[str, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    weights: tuple[float, ...]
    intercept: float
    threshold: float
    share: float
    dev: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def probability(self, values: Mapping[str, float]) -> float:
        """The probability that expansion helps, by features; UserError if one is missing."""
        if missing := [name for name in self.features if name not in values]:
            raise UserError(f"the gate reads {missing[0]}, which this search does not tell")
        row = np.array([[values[name] for name in self.features]])
        return float(_probabilities(row, self)[0])

    def expands(self, values: Mapping[str, float]) -> bool:
        """Whether to expand a query, by its features."""
        return self.probability(values) >= self.threshold

    def __str__(self) -> str:
        return f"threshold {self.threshold:.4g}, {self.share:.0%} of the dev queries expanded"


def should_expand(gate: Gate, search: PlainSearch) -> bool:
    """Whether a query is to be expanded, by its plain search; of the gate before generation."""
    return gate.expands(features_before(search))


def fit_gate(features: Features, plain: Mapping[str, float], expanded: Mapping[str, float]) -> Gate:
    """Fits a gate on dev queries, and chooses its threshold by cross-fitting.

    Every query's probability is that of a model that has not seen it (`FOLDS` folds by a hash of
    the query's id), and by these the threshold is chosen. Whether a threshold is worth having is
    asked in the same way: each fold is gated by the threshold that the others choose. If that is
    not better than expanding always and than expanding never, the better of these two it is.

    Args:
        features: The same ones for each query, all finite.
        plain: Each query's value on dev as it is.
        expanded: Each query's value expanded.
    """
    ids, names = sorted(features), tuple(next(iter(features.values())))
    rows = np.array([[features[query][name] for name in names] for query in ids])
    without = np.array([plain[query] for query in ids])
    gains = np.array([expanded[query] for query in ids]) - without
    folds = np.array([fold_of(query) for query in ids])
    chances = np.zeros(len(ids))
    for fold in np.unique(folds):
        held = folds == fold
        chances[held] = _probabilities(rows[held], fit_model(names, rows[~held], gains[~held]))
    crossed = np.zeros(len(ids))
    for fold in np.unique(folds):
        held = folds == fold
        threshold = best_threshold(chances[~held], gains[~held])
        crossed[held] = gains[held] * (chances[held] >= threshold)
    gated, always = float(crossed.mean()), float(gains.mean())
    threshold = ALWAYS if always > 0 else NEVER
    if gated > max(always, 0.0):
        threshold = best_threshold(chances, gains)
    base = float(without.mean())
    return dataclasses.replace(
        fit_model(names, rows, gains),
        threshold=threshold,
        share=float((chances >= threshold).mean()),
        dev={"queries": len(ids), "never": base, "always": base + always, "gated": base + gated},
    )


def fold_of(query: str) -> int:
    """The fold of a query, which does not depend on the other queries."""
    return int.from_bytes(hashlib.sha256(query.encode()).digest()[:8], "big") % FOLDS


def best_threshold(chances: np.ndarray, gains: np.ndarray) -> float:
    """The threshold with the largest sum of gains; of equal ones the one that expands least.

    Tried are `NEVER`, those that expand a tenth of the queries, two tenths and so on, each midway
    between two probabilities, and `ALWAYS`.
    """
    order = np.argsort(-chances, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(gains[order])])
    best, chosen = 0.0, NEVER
    for share in range(1, TRIED_SHARES + 1):
        count = round(share * len(chances) / TRIED_SHARES)
        if share == TRIED_SHARES:
            threshold = ALWAYS
        elif not 0 < count < len(chances) or chances[order[count - 1]] == chances[order[count]]:
            continue
        else:
            threshold = float(chances[order[count - 1]] + chances[order[count]]) / 2
        if sums[count] > best + 1e-12:
            best, chosen = sums[count], threshold
    return chosen


def fit_model(names: Sequence[str], rows: np.ndarray, gains: np.ndarray) -> Gate:
    """A gate without a threshold, of features [queries, features] and what expanding gained.

    It has the least sum over queries of |gain| (as shares of their mean) times the log-loss of
    gain > 0, plus `PENALTY` / 2 times the square of the weights, but not of the intercept.
    Features are standardised by all of the queries. Where all that gained or lost did the same,
    nothing tells them apart, and the intercept alone says how many they were.
    """
    means = rows.mean(axis=0) if len(rows) else np.zeros(len(names))
    deviations = rows.std(axis=0) if len(rows) else np.ones(len(names))
    deviations = np.where(deviations > 1e-9 * np.maximum(np.abs(means), 1), deviations, 1.0)
    labels, importance = gains > 0, np.abs(gains)
    if labels[importance > 0].any() and not labels[importance > 0].all():
        scaled = (rows - means) / deviations
        mean = importance[importance > 0].mean()
        weights, intercept = logistic(scaled, labels, importance / mean, PENALTY)
    else:
        counted = len(gains[importance > 0])
        weights = np.zeros(len(names))
        intercept = math.log(counted + 1) * (1 if labels.any() else -1)
    parts = (tuple(each.tolist()) for each in (means, deviations, weights))
    return Gate(tuple(names), *parts, float(intercept), threshold=NEVER, share=0.0)


def logistic(
    rows: np.ndarray, labels: np.ndarray, importance: np.ndarray, penalty: float
) -> tuple[np.ndarray, float]:
    """Weights [features] and intercept of the L2 logistic regression, to about 1e-7."""
    import scipy.optimize  # Takes a while, and runs without a gate need none.

    signs = np.where(labels, 1.0, -1.0)
    design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    held = np.array([penalty] * rows.shape[1] + [0.0])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margins = signs * (design @ weights)
        value = importance @ np.logaddexp(0, -margins) + (held * weights**2).sum() / 2
        return value, held * weights - design.T @ (signs * importance * wrong(margins))

    def curvature(weights: np.ndarray) -> np.ndarray:
        missed = wrong(signs * (design @ weights))
        return design.T * (importance * missed * (1 - missed)) @ design + np.diag(held)

    def wrong(margins: np.ndarray) -> np.ndarray:
        return np.exp(-np.logaddexp(0, margins))  # Probability of the other label.

    found = scipy.optimize.minimize(
        loss, np.zeros(design.shape[1]), jac=True, hess=curvature, method="trust-exact",
        options={"gtol": 1e-6},
    )  # fmt: skip
    return found.x[:-1], float(found.x[-1])


def _probabilities(rows: np.ndarray, gate: Gate) -> np.ndarray:
    scaled = (rows - np.array(gate.means)) / np.array(gate.deviations)
    odds = scaled @ np.array(gate.weights) + gate.intercept
    return np.minimum(np.exp(-np.logaddexp(0, -odds)), _MOST)


def write_gates(path: str | os.PathLike, gates: Mapping[str, Gate]) -> None:
    """Writes gates, by the names of their rows."""
    write_json(path, {name: dataclasses.asdict(gate) for name, gate in gates.items()})


def read_gates(path: str | os.PathLike, names: Collection[str] = ()) -> dict[str, Gate]:
    """Reads what `write_gates` wrote, these gates at least.

    Raises:
        UserError: The file is not there, lacks one of them, or is anything else.
    """
    try:
        with open(path, encoding="utf-8") as file:
            gates = {name: _gate(record) for name, record in json.load(file).items()}
        if missing := [name for name in names if name not in gates]:
            raise ValueError(f"{missing[0]} is missing")
        return gates
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected the gates of a run") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: no file of gates: {error}") from None


def _gate(record: Mapping[str, Any]) -> Gate:
    """Raises ValueError, LookupError or TypeError unless the record is a gate's, and whole."""
    fields = {field.name for field in dataclasses.fields(Gate)}
    if other := fields ^ record.keys():
        raise ValueError(f"{min(other)} is {'missing' if min(other) in fields else 'unknown'}")
    names = record["features"]
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("features are no list of names")
    if len({*names}) != len(names):
        raise ValueError("a feature stands there twice")
    for key in _LISTS:
        values = record[key]
        if not (isinstance(values, list) and all(map(_is_number, values))):
            raise ValueError(f"{key} are no list of finite numbers")
        if len(values) != len(names):
            raise ValueError(f"{len(values)} {key} of {len(names)} features")
    for key in _NUMBERS:
        if not _is_number(record[key]):
            raise ValueError(f"{key} is no finite number")
    if min(record["deviations"], default=1.0) <= 0:
        raise ValueError("a deviation is not above 0")
    for key in ("threshold", "share"):
        if not 0 <= record[key] <= 1:
            raise ValueError(f"{key} is {record[key]}, not between 0 and 1")
    if not (isinstance(record["dev"], dict) and all(map(_is_number, record["dev"].values()))):
        raise ValueError("dev is no object of finite numbers")
    several = {key: tuple(record[key]) for key in ("features", *_LISTS)}
    return Gate(**{**record, **several})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
