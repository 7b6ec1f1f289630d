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
_BATCHES = 64  # So many of queries does one pass over the corpus serve.


@dataclasses.dataclass(frozen=True)
class ExactOptions:
    """Settings of the exact index; configs/base.py says what each means."""

    block_rows: Annotated[int, count(1)] = 8192
    query_rows: Annotated[int, count(1)] = 1024
    resident_mib: Annotated[int, count(0)] = 512

    def held_bytes(self, width: int, depth: int) -> int:
        """What a device holds, at most, beside the block and the batch in hand."""
        queries = _BATCHES * self.query_rows * (4 * width + 8 * depth)
        return (self.resident_mib << 20) + queries


class ExactIndex(Index):
    """Every inner product, in float32.

    Whatever the corpus's size, a device has two blocks that pass by, `resident_mib` of others that
    stay there from one search to the next, and 64 batches of queries.
    """

    backend, options_type, file_names = "exact", ExactOptions, (_FILE,)
    is_kept = False  # Nothing is built, and what is saved is a copy.
    _devices: Sequence[jax.Device] | None = None
    _whole_block: int | None = None

    def __init__(
        self,
        vectors: np.ndarray,
        options: ExactOptions = ExactOptions(),
        devices: Sequence[jax.Device] | None = None,
        block_rows: int | None = None,
    ):
        """Indexes `vectors` [N, D] without copying them: a memory map stays one.

        Args:
            vectors: finite floating point numbers.
            options: sizes.
            devices: the devices that search; None: all of this process.
            block_rows: rows of a product, as of the corpus that the vectors are a part of, so that
                scores are the same to the last bit; None: these are all.

        Raises:
            UserError: vectors or options cannot be used.
        """
        self.options = read_section(ExactOptions, vars(options), "exact search option ")
        check_vectors(vectors)
        self._vectors = vectors
        self._devices, self._whole_block = devices, block_rows
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
        found = [
            self._pass(batches[first : first + _BATCHES], k)
            for first in range(0, len(batches), _BATCHES)
        ]
        scores, indices = (
            np.concatenate([np.empty((0, k), kind), *(part[i] for part in found)])[: len(queries)]
            for i, kind in enumerate((np.float32, np.int32))
        )
        return scores, indices

    @functools.cached_property
    def _block_rows(self) -> int:
        return self._whole_block or min(self.options.block_rows, self.size)

    @functools.cached_property
    def _resident(self) -> dict[int, jax.Array]:
        """Blocks that stay on their devices, by their numbers."""
        return {}

    def _block(self, turn: int, device: jax.Device, most: int) -> jax.Array:
        """A block on its device, which keeps the first `most`."""
        rows = self._block_rows
        block = self._resident.get(turn)
        if block is None:
            vectors = self._vectors[turn * rows : (turn + 1) * rows]
            vectors = np.asarray(vectors, dtype=np.float32)
            block = jax.device_put(_pad_rows(vectors, rows), device)
            if turn < most:
                self._resident[turn] = block
        return block

    def _pass(self, batches: Sequence[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
        """The best for batches of queries [rows, D], in one pass over the corpus: [all, k] each."""
        rows, block_rows = len(batches[0]), self._block_rows
        offsets = range(0, self.size, block_rows)
        devices = (self._devices or jax.local_devices())[: len(offsets)]
        room = 0 if shares_memory(devices[0]) else self.options.resident_mib << 20
        most = len(devices) * (room // (4 * block_rows * self.dimension))
        empty = np.full((rows, k), -np.inf, np.float32), np.zeros((rows, k), np.int32)
        asked = [jax.device_put(batches, device) for device in devices]
        best = [[jax.device_put(empty, device) for _ in batches] for device in devices]
        for turn, offset in enumerate(offsets):
            mine = turn % len(devices)
            block = self._block(turn, devices[mine], most)
            jax.block_until_ready(best[mine])  # No more blocks than two wait on a device.
            best[mine] = [
                merge_block(*found, batch, block, offset, self.size)
                for found, batch in zip(best[mine], asked[mine], strict=True)
            ]
        merged = [merge_found(jax.device_get(found), k) for found in zip(*best, strict=True)]
        scores, indices = map(np.concatenate, zip(*merged, strict=True))
        return scores, indices

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


def shares_memory(device: jax.Device) -> bool:
    """Whether what is on a device is in the host's memory, and so no nearer there."""
    return device.platform == "cpu"


def merge_found(
    found: Sequence[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The best k of what each part of a corpus gave, equal scores in the order of the corpus."""
    scores, indices = (np.concatenate(part, axis=1) for part in zip(*found, strict=True))
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(indices, order, 1)


def _pad_rows(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, ((0, rows - len(array)), (0, 0)))
