"""The worth of single fresh passages, query by query: evaluation/samples.jsonl and its means."""

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from expandr_jax.files.records import read_jsonl

RANK = "reciprocal_rank"  # 1 / rank of the relevant document, where the passage is searched alone.
REWARD = "corpus_reward"  # What the passage does for its query's search, as in training.
SAMPLE_METRICS = {RANK: "reciprocal rank of samples", REWARD: "corpus reward of samples"}
_FIELDS = {"query_id": str, "split": str, "system": str, RANK: float}


def read_samples(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of samples.jsonl; UserError names a line that is wrong."""
    return [row for _, row in read_jsonl(path, _FIELDS)]


def mean_by_query(
    rows: Iterable[Mapping[str, Any]], system: str, split: str, field: str
) -> dict[str, float]:
    """Query -> mean of RANK or REWARD over a system's samples; none where the run lacks the field.

    Rows are those of samples.jsonl; the split is "dev" or "test".
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["system"] == system and row["split"] == split and field in row:
            values.setdefault(row["query_id"], []).append(row[field])
    return {query: float(np.mean(several)) for query, several in values.items()}
