"""Reads prepared rows through grain: all of them shuffled, shared by hosts, resumed exactly."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from expandr_jax.data.builders.prepare import Row, tfds_name
from expandr_jax.errors import UserError


class _Source:
    """Random access to the rows of one split, text as str and sequences as lists."""

    def __init__(self, prepared: tfds.core.DatasetBuilder, split: str):
        self._directory = str(prepared.data_path)
        self._source = prepared.as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Row:
        try:
            row = self._source[index]
        except RuntimeError as error:  # array_record's own, of a checksum or a length.
            reason = str(error).split(";")[0][:200]
            raise UserError(
                f"{self._directory}: row {index} is damaged ({reason}); delete this directory, and "
                "it is prepared again"
            ) from None
        return {name: _plain(value) for name, value in row.items()}

    def __repr__(self) -> str:  # grain writes it into its messages.
        return f"{self._directory} ({len(self)} rows)"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, np.ndarray)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def rows(prepared: tfds.core.DatasetBuilder, split: str) -> grain.MapDataset:
    """The rows of a split in the order of their source, read when they are asked for.

    Raises:
        UserError: There is no such split: its source has no such row.
    """
    if tfds_name(split) not in prepared.info.splits:
        raise UserError(
            f"{prepared.data_path}: no rows of split {split!r}; there are "
            f"{', '.join(prepared.info.splits)}"
        )
    return grain.MapDataset.source(_Source(prepared, tfds_name(split)))


def shuffled(
    parts: Sequence[grain.MapDataset], *, seed: int, weights: Sequence[float] | None = None
) -> grain.MapDataset:
    """Rows of several sources in an order of the seed's, another in each epoch.

    Args:
        parts: From `rows`.
        seed: Seed of the order.
        weights: The sources' shares of the rows, interleaved evenly. An epoch ends when the first
            source does, so that no row stands in it twice. None: all rows of all of them.

    Raises:
        UserError: The weights do not fit.
    """
    if weights is None:
        return grain.MapDataset.concatenate(list(parts)).shuffle(seed)
    if len(weights) != len(parts) or min(weights) <= 0:
        raise UserError(f"weights {tuple(weights)} of {len(parts)} sources; expected one each, > 0")
    each = [part.shuffle(seed + number) for number, part in enumerate(parts)]
    return grain.MapDataset.mix(each, list(weights))


class Stream(Iterator[list[Row]]):
    """Batches of rows for one of several hosts; goes on exactly where a saved state says.

    Hosts get disjoint rows, which together are all of them; an epoch's last rows that do not fill
    a batch on every host are left to the next epoch's shuffle.

    Args:
        dataset: From `shuffled`; the same on every host.
        batch_size: Rows a batch, on this host.
        host: Which one this is.
        hosts: How many there are.
        epochs: After which it ends; None: never.
        workers: Processes that read ahead; 0 reads in this one. The rows do not depend on it.

    Raises:
        UserError: There are too few rows for a batch.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        *,
        batch_size: int,
        host: int = 0,
        hosts: int = 1,
        epochs: int | None = None,
        workers: int = 0,
    ):
        even = len(dataset) // (hosts * batch_size) * hosts * batch_size
        if not even:
            raise UserError(
                f"{len(dataset)} rows do not fill a batch of {batch_size} on each of {hosts} hosts"
            )
        # A slice before the repetition: each epoch cuts its own order.
        own = dataset[:even][host::hosts].repeat(epochs).batch(batch_size, batch_fn=list)
        batches = own.to_iter_dataset()
        if workers:
            # The processes are given the flags of absl, which a library's caller need not have.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._layout = {
            "rows": len(dataset), "batch_size": batch_size, "host": host, "hosts": hosts,
            "epochs": epochs, "workers": workers,
        }  # fmt: skip
        self._iterator = iter(batches)

    def __next__(self) -> list[Row]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """What JSON can hold of where it stands; `set_state` of another stream goes on from it."""
        return {"layout": self._layout, "iterator": self._iterator.get_state()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to where another stream stood.

        Raises:
            UserError: That stream had other rows, hosts or workers.
        """
        if dict(state["layout"]) != self._layout:
            raise UserError(
                f"the state is of a stream with {state['layout']}; this one has {self._layout}"
            )
        self._iterator.set_state(state["iterator"])
