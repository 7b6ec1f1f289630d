"""Checks on the vectors that go into an index and against it."""

import hashlib
from collections.abc import Iterator

import numpy as np

from expandr_jax.errors import UserError

_LONGEST = 1e15  # Length of a vector; sums of squares of longer ones overflow, which ends ScaNN.
_BLOCK_BYTES = 1 << 24  # What a scan over memory-mapped vectors holds at a time.


def check_vectors(vectors: np.ndarray) -> None:
    """Raises UserError unless `vectors` is a non-empty [N, D] array of floats.

    None may be NaN or infinite, or so long that products with it could be.
    """
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


def check_queries(queries: np.ndarray, dimension: int) -> np.ndarray:
    """Returns `queries` as float32 [Q, D], or raises UserError if they cannot be searched."""
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
    with np.errstate(over="ignore", invalid="ignore"):
        block = np.asarray(block, dtype=np.float32)
        sound = np.einsum("nd,nd->n", block, block) <= _LONGEST**2  # NaN is not.
    if not sound.all():
        row = int(np.argmin(sound))
        finite = np.isfinite(block[row]).all()
        what = f"is longer than {_LONGEST:g}" if finite else "holds NaN or infinity"
        raise UserError(f"{name} {first_row + row} {what}; nothing near it can be searched")
