"""What results.json says of systems: their means, and the tests between pairs of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax import metrics

Values = Mapping[str, Mapping[str, Mapping[str, float]]]  # system -> metric -> query -> value


def summary(dataset: str, values: Values, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """The contents of results.json, nothing being chosen.

    Args:
        dataset: Its name.
        values: At least one system's.
        pairs: (system, baseline), each tested under every metric.
    """
    first = next(iter(values.values()))
    return {
        "dataset": dataset,
        "queries": len(next(iter(first.values()))),
        "chosen": {},
        "rows": [
            {"system": name, **{m: round(metrics.mean(of[m]), 6) for m in of}}
            for name, of in values.items()
        ],
        "significance": [
            {
                "system": system,
                "baseline": baseline,
                "metric": metric,
                **metrics.paired_test(values[system][metric], values[baseline][metric]),
            }
            for system, baseline in pairs
            for metric in first
        ],
    }
