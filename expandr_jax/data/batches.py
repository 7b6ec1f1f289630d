"""Fixed shapes from ragged text, in an order that depends on the seed and the step alone."""

import functools
from collections.abc import Sequence

import numpy as np

# Encoding sorts texts by length and its programs compile quickly: closely spaced lengths pay. A
# training step takes ten times as long to compile, and a batch's longest text varies little.
ENCODING_LENGTHS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
TRAINING_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def encoding_lengths(longest: int) -> list[int]:
    """The buckets of texts that are encoded: of at most `longest` tokens, doubled from 8192 on."""
    lengths = [*ENCODING_LENGTHS]
    while lengths[-1] < longest:
        lengths.append(2 * lengths[-1])
    return [length for length in lengths if length < longest] + [longest]


def bucket_length(length: int, buckets: Sequence[int] = TRAINING_LENGTHS) -> int:
    """The least bucket that holds `length` tokens.

    Raises:
        ValueError: If none does.
    """
    for bucket in buckets:
        if length <= bucket:
            return bucket
    raise ValueError(f"{length} tokens are above the longest bucket, {buckets[-1]}")


def best_lengths(needed: Sequence[int], most: int) -> tuple[int, ...]:
    """The lengths, `most` of them or fewer, that batches are padded to with the least filling.

    Args:
        needed: Tokens of each batch's longest row.
        most: Lengths at most; each is a program to compile.

    Returns:
        Multiples of 16 in rising order; the last holds all.
    """
    rounded = [-(-length // 16) * 16 for length in needed]
    sizes, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # Batches shorter than each size.
    # cost[j]: tokens of the batches below size j, padded to the lengths taken so far.
    cost, taken = np.full(len(sizes) + 1, np.inf), [()] * (len(sizes) + 1)
    cost[0] = 0
    for _ in range(min(most, len(sizes))):
        new, picks = cost.copy(), list(taken)
        for last, size in enumerate(sizes):
            tried = cost[: last + 1] + size * (before[last + 1] - before[: last + 1])
            first = int(np.argmin(tried))
            if tried[first] < new[last + 1]:
                new[last + 1], picks[last + 1] = tried[first], (*taken[first], int(size))
        cost, taken = new, picks
    return taken[-1]


def fewest_sizes(needed: np.ndarray, rows: Sequence[int], most: int) -> np.ndarray:
    """Sizes, `most` of them or fewer, that batches of several arrays are padded to.

    Sizes that are needed stay as they are while there are no more of them; else those two become
    one, again and again, that fill all batches up with the least padding.

    Args:
        needed: [batches, arrays] int, the length of each array.
        rows: [arrays], the relative number of rows of each array.
        most: Sizes at most; each is a program to compile.

    Returns:
        [sizes, arrays] int.
    """
    sizes, counts = np.unique(needed, axis=0, return_counts=True)
    rows = np.asarray(rows)

    def added(one: int, others: np.ndarray) -> np.ndarray:
        """Tokens that are padding more where a size and each of some others become one."""
        larger = np.maximum(sizes[one], sizes[others])
        of_one, of_others = (larger - sizes[one]) @ rows, (larger - sizes[others]) @ rows
        return counts[one] * of_one + counts[others] * of_others

    cost = np.full((len(sizes), len(sizes)), np.inf)
    for one in range(len(sizes) if len(sizes) > most else 0):
        cost[one, :one] = added(one, np.arange(one))
    left = np.ones(len(sizes), bool)
    while left.sum() > most:
        gone, kept = np.unravel_index(np.argmin(cost), cost.shape)
        sizes[kept] = np.maximum(sizes[kept], sizes[gone])
        counts[kept] += counts[gone]
        left[gone] = False
        cost[gone], cost[:, gone] = np.inf, np.inf
        others = np.flatnonzero(left & (np.arange(len(sizes)) != kept))
        cost[np.maximum(kept, others), np.minimum(kept, others)] = added(kept, others)
    return sizes[left]


def pad(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    length: int | None = None,
    longest: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids and mask, both [rows, length] int32.

    `length` defaults to a bucket, or to `longest`, which no sequence is above, if that is less.
    """
    if length is None:
        length = bucket_length(max((len(sequence) for sequence in sequences), default=1))
        length = length if longest is None else min(length, longest)
    lengths = np.fromiter(map(len, sequences), np.int32, len(sequences))
    mask = np.arange(length, dtype=np.int32) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, np.int32)
    if len(sequences):
        # All at once: numpy needs more time for two assignments a row than for what is in them.
        ids[mask] = np.concatenate([np.asarray(sequence, np.int32) for sequence in sequences])
    return ids, mask.astype(np.int32)


def batch_indices(
    seed: int,
    step: int,
    count: int,
    batch_size: int,
    lengths: np.ndarray | None = None,
    window: int = 1,
) -> np.ndarray:
    """Which of `count` examples make up batch `step`: a fresh shuffle each epoch, no remainder.

    The order is a function of its arguments, so a run that resumes at a step needs no iterator's
    state, and neither hosts nor restarts can change it.

    Args:
        seed, step: What the order is drawn from.
        count: Examples.
        batch_size: Examples in a batch.
        lengths: [count], of each example; with it, batches have examples of like length: those of
            `window` batches are sorted by it, then the batches of the epoch are shuffled.
        window: Batches that are sorted together.

    Returns:
        [batch_size] int64.

    Raises:
        ValueError: If there are fewer examples than one batch holds.
    """
    per_epoch = count // batch_size
    if per_epoch == 0:
        raise ValueError(f"{count} examples do not fill one batch of {batch_size}")
    epoch, batch = divmod(step, per_epoch)
    order, batches = _epoch_order(seed, epoch, count, per_epoch)
    order, first = order[: per_epoch * batch_size], 0
    if lengths is not None:
        batch = int(batches[batch])
        first = batch // window * window
        order = order[first * batch_size : (first + window) * batch_size]
        order = order[np.argsort(lengths[order], kind="stable")]
    start = (batch - first) * batch_size
    return order[start : start + batch_size].copy()  # Not a view, which keeps the epoch's order.


def epoch_order(seed: int, epoch: int, count: int, batch_size: int) -> np.ndarray:
    """The examples of an epoch, [n] int64, as `batch_indices` shuffles them; no remainder."""
    per_epoch = count // batch_size
    return _epoch_order(seed, epoch, count, per_epoch)[0][: per_epoch * batch_size]


@functools.lru_cache(maxsize=2)  # Batches are made ahead: those of the next epoch, too.
def _epoch_order(
    seed: int, epoch: int, count: int, per_epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The shuffles of an epoch: of its `count` examples, and of its `per_epoch` batches.

    They are drawn once for all steps of the epoch: a shuffle takes time that grows with the data.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    return generator.permutation(count), generator.permutation(per_epoch)
