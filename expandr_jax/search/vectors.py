"""Checks on the vectors that go into and against an index."""

import hashlib
from collections.abc import Iterator

import numpy as np

from expandr_jax.errors import UserError

_BLOCK_BYTES = 1 << 24  # what a scan over memory-mapped vectors holds at a time


def check_vectors(vectors: np.ndarray) -> None:
    """Raises UserError unless `vectors` is a non-empty, finite [N, D] array of floats."""
    if vectors.ndim != 2:
        raise UserError(f"corpus vectors have shape {vectors.shape}; expected [N, D]")
    if 0 in vectors.shape:
        raise UserError(f"corpus vectors have shape {vectors.shape}; there is nothing to index")
    if vectors.dtype.kind not in "fV":  # bfloat16 of ml_dtypes is of kind V
        raise UserError(f"corpus vectors have type {vectors.dtype}; expected floating point")
    row = 0
    for block in _blocks(vectors):
        _check_finite(block, "corpus vector", row)
        row += len(block)


def check_queries(queries: np.ndarray, dimension: int, k: int) -> np.ndarray:
    """Returns `queries` as float32 [Q, D], or raises UserError if they cannot be searched."""
    if k < 1:
        raise UserError(f"k is {k}; a search returns at least 1 result a query")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise UserError(f"query vectors have shape {queries.shape}; expected [Q, {dimension}]")
    _check_finite(queries, "query vector", 0)
    return queries


def fingerprint(vectors: np.ndarray) -> str:
    """Returns the sha256 of the type, shape and bytes of `vectors` [N, D]."""
    digest = hashlib.sha256(f"{vectors.dtype.name} {vectors.shape}\n".encode())
    for block in _blocks(vectors):
        digest.update(np.ascontiguousarray(block).view(np.uint8))
    return digest.hexdigest()


def _blocks(vectors: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK_BYTES // max(1, vectors.shape[1] * vectors.dtype.itemsize))
    for start in range(0, len(vectors), rows):
        yield vectors[start : start + rows]


def _check_finite(block: np.ndarray, name: str, first_row: int) -> None:
    finite = np.isfinite(np.asarray(block, dtype=np.float32)).all(axis=1)
    if not finite.all():
        row = first_row + int(np.argmin(finite))
        raise UserError(f"{name} {row} holds NaN or infinity; nothing near it can be searched")
