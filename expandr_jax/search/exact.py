"""Exact search: matrix products and top-k on the devices, each with its share of the corpus.

Devices take the corpus's blocks in turn and keep what is best among theirs; the host merges that at
the end. Every block has the same shape and nothing passes between devices, so that what is found
does not depend on how many there are, to the last bit.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.search.index import Index
from expandr_jax.search.vectors import check_queries, check_vectors, fingerprint
from expandr_jax.settings import count, read_section

_FILE = "vectors.npy"


@dataclasses.dataclass(frozen=True)
class ExactOptions:
    """Settings of the exact index; configs/base.py says what each means."""

    block_rows: Annotated[int, count(1)] = 8192
    query_rows: Annotated[int, count(1)] = 1024


class ExactIndex(Index):
    """Every inner product, in float32; two blocks on each device whatever the corpus's size."""

    backend, options_type, file_names = "exact", ExactOptions, (_FILE,)
    _devices: Sequence[jax.Device] | None = None

    def __init__(
        self,
        vectors: np.ndarray,
        options: ExactOptions = ExactOptions(),
        devices: Sequence[jax.Device] | None = None,
    ):
        """Indexes `vectors` [N, D] without copying them: a memory map stays one.

        Args:
            vectors: finite floating point numbers.
            options: sizes.
            devices: the devices that search; None: all of this process.

        Raises:
            UserError: vectors or options cannot be used.
        """
        self.options = read_section(ExactOptions, vars(options), "exact search option ")
        check_vectors(vectors)
        self._vectors = vectors
        self._devices = devices
        self.size, self.dimension = vectors.shape

    @functools.cached_property
    def fingerprint(self) -> str:
        """The sha256 of the vectors."""
        return fingerprint(self._vectors)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        queries = check_queries(queries, self.dimension)
        # Few shapes to compile: batches of queries have a power of two of rows.
        rows = min(self.options.query_rows, 1 << max(0, len(queries) - 1).bit_length())
        starts = range(0, len(queries), rows)
        batches = [_pad_rows(queries[start : start + rows], rows) for start in starts]
        block_rows = min(self.options.block_rows, self.size)
        offsets = range(0, self.size, block_rows)
        devices = (self._devices or jax.local_devices())[: len(offsets)]
        empty = np.full((rows, k), -np.inf, np.float32), np.zeros((rows, k), np.int32)
        asked = [jax.device_put(batches, device) for device in devices]
        best = [[jax.device_put(empty, device) for _ in batches] for device in devices]
        for turn, offset in enumerate(offsets):
            mine = turn % len(devices)
            block = np.asarray(self._vectors[offset : offset + block_rows], dtype=np.float32)
            block = jax.device_put(_pad_rows(block, block_rows), devices[mine])
            jax.block_until_ready(best[mine])  # No more blocks than two wait on a device.
            best[mine] = [
                merge_block(*found, batch, block, offset, self.size)
                for found, batch in zip(best[mine], asked[mine], strict=True)
            ]
        merged = [_merge_devices(jax.device_get(found), k) for found in zip(*best, strict=True)]
        scores = [found[0] for found in merged] or [np.empty((0, k), np.float32)]
        indices = [found[1] for found in merged] or [np.empty((0, k), np.int32)]
        return np.concatenate(scores)[: len(queries)], np.concatenate(indices)[: len(queries)]

    def _write(self, directory: pathlib.Path) -> None:
        np.save(directory / _FILE, np.asarray(self._vectors, dtype=np.float32))

    def _open(self, directory: str | os.PathLike) -> None:
        path = os.path.join(directory, _FILE)
        self._vectors = np.load(path, mmap_mode="r", allow_pickle=False)


@jax.jit
def merge_block(
    scores: jax.Array,
    indices: jax.Array,
    queries: jax.Array,
    block: jax.Array,
    offset: jax.Array,
    size: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Merges a block [B, D] that starts at row `offset` into the best [Q, k] so far."""
    new = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    new = jnp.where(new == 0, 0, new)  # top_k would rank 0.0 before -0.0.
    rows = offset + jnp.arange(len(block), dtype=jnp.int32)
    new = jnp.where(rows < size, new, -jnp.inf)
    # top_k is stable and earlier blocks stand first, so ties keep the order of the corpus.
    scores, position = jax.lax.top_k(jnp.concatenate([scores, new], axis=1), scores.shape[1])
    candidates = jnp.concatenate([indices, jnp.broadcast_to(rows, new.shape)], axis=1)
    return scores, jnp.take_along_axis(candidates, position, axis=1)


def _merge_devices(
    found: Sequence[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of what each device found, equal scores in the order of the corpus."""
    scores, indices = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, ((0, rows - len(array)), (0, 0)))
