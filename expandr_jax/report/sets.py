"""Means over several collections."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_over_sets(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over sets, where sets named "cqadupstack/android" and so on count as one together.

    Returns:
        "sets": name -> rows as in results.json; "rows": their means.
    """
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for name, result in results.items():
        groups.setdefault(name.partition("/")[0], []).append(result["rows"])
    sets = {name: _mean_rows(several) for name, several in groups.items()}
    return {"sets": sets, "rows": _mean_rows(list(sets.values()))}


def _mean_rows(tables: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    names = [name for name in tables[0][0] if name != "system"]
    return [
        {
            "system": rows[0]["system"],
            **{m: round(float(np.mean([row[m] for row in rows])), 6) for m in names},
        }
        for rows in zip(*tables, strict=True)
    ]
