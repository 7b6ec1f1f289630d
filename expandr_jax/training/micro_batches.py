"""A batch in pieces, for a loop over them that compiles once."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def split_rows(x: jax.Array, micro_batch: int) -> jax.Array:
    """[rows, n] to [rows / micro_batch, micro_batch, n]."""
    # Every so many rows, not side by side: on a mesh each micro-batch has rows of every device.
    return jnp.swapaxes(x.reshape(micro_batch, -1, x.shape[1]), 0, 1)


def join_rows(x: jax.Array) -> jax.Array:
    """Undoes `split_rows`."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, x.shape[-1])


def join(pieces: Iterable[Any]) -> Any:
    """Trees of split arrays one after another; they agree in all but the number of pieces."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def by_length(batch: Mapping[str, jax.Array], towers: Sequence[str]) -> list[list[str]]:
    """The kinds of text that a batch has ("X_ids"), those of one length together."""
    groups: dict[int, list[str]] = {}
    for tower in (tower for tower in towers if f"{tower}_ids" in batch):
        groups.setdefault(batch[f"{tower}_ids"].shape[1], []).append(tower)
    return list(groups.values())
