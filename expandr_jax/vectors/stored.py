"""Types in which vectors are kept on disk, each read back as float32.

float32 and float16 are plain .npy arrays. .npy has neither bfloat16 nor a scale for each row, so
these are arrays of records: {"bfloat16": [dim] uint16}, the upper half of a float32's bits; and
{"scale": float32, "int8": [dim]}, where a vector is its numbers times its scale.
"""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

VECTOR_DTYPES = ("float32", "float16", "bfloat16", "int8")
_GREATEST = 127  # An int8, either side of zero.


class StoredVectors:
    """Records as vectors: looks like a [count, dim] float32 array, and decodes what is indexed.

    The records are from `to_storage`, [count], and may be memory-mapped.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, records: np.ndarray):
        self.records = records
        name = records.dtype.names[-1]
        self.shape = (len(records), *records.dtype[name].shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Vectors [..., dim] float32 of rows: a number, a slice or an array of numbers."""
        part = self.records[rows]
        if "int8" in part.dtype.names:
            return part["int8"].astype(np.float32) * part["scale"][..., None]
        return (part["bfloat16"].astype(np.uint32) << 16).view(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("stored vectors are decoded, which copies them")
        return self[:].astype(dtype or self.dtype, copy=False)


def storage_type(dtype: str, width: int) -> tuple[np.dtype, tuple[int, ...]]:
    """The type of a file's elements and the shape of one of its rows."""
    if dtype == "int8":
        return np.dtype([("scale", "<f4"), ("int8", "i1", (width,))]), ()
    if dtype == "bfloat16":
        return np.dtype([("bfloat16", "<u2", (width,))]), ()
    return np.dtype(dtype), (width,)


def to_storage(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Vectors [count, dim] float32 as the rows of a file.

    An int8 vector's scale is its greatest component's size over 127, so that each component is
    right to half of that. bfloat16 rounds to the nearest, ties to even.
    """
    kind, _ = storage_type(dtype, vectors.shape[1])
    if kind.names is None:
        return vectors.astype(kind)
    records = np.empty(len(vectors), kind)
    if dtype == "bfloat16":
        records["bfloat16"] = vectors.astype(jnp.bfloat16).view(np.uint16)
        return records
    scale = (np.abs(vectors).max(axis=1) / _GREATEST).astype(np.float32)
    records["scale"] = scale
    safe = np.where(scale > 0, scale, 1.0)[:, None]
    records["int8"] = np.clip(np.rint(vectors / safe), -_GREATEST, _GREATEST)
    return records


def from_storage(rows: np.ndarray) -> np.ndarray | StoredVectors:
    """What `to_storage` made, as [count, dim] vectors."""
    return rows if rows.dtype.names is None else StoredVectors(rows)


def open_vectors(
    path: str | os.PathLike, start: int = 0, end: int | None = None
) -> np.ndarray | StoredVectors:
    """Opens a file of `file.encode_to_file`, or some of its rows: [count, dim], memory-mapped."""
    return from_storage(np.load(path, mmap_mode="r", allow_pickle=False)[start:end])
