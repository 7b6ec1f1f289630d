"""Padding and the order of data."""

import itertools

import numpy as np
import pytest

from expandr_jax.data.batches import (
    batch_indices,
    best_lengths,
    bucket_length,
    encoding_lengths,
    fewest_sizes,
    pad,
)


def test_buckets():
    assert bucket_length(1) == 16
    assert bucket_length(16) == 16
    assert bucket_length(33) == 64
    assert bucket_length(3, (2, 4)) == 4
    with pytest.raises(ValueError, match="above the longest bucket"):
        bucket_length(5, (2, 4))


def test_no_other_lengths_fill_batches_up_with_less():
    rng = np.random.default_rng(0)
    for _ in range(100):
        needed = rng.integers(1, 150, rng.integers(1, 12)).tolist()
        most = int(rng.integers(1, 5))
        rounded = [-(-length // 16) * 16 for length in needed]

        def filled(lengths, rounded=rounded):
            return sum(min(size for size in lengths if size >= own) for own in rounded)

        sizes = sorted(set(rounded))
        least = min(
            filled((*others, sizes[-1]))
            for count in range(min(most, len(sizes)))
            for others in itertools.combinations(sizes[:-1], count)
        )
        found = best_lengths(needed, most)
        assert len(found) <= most
        assert filled(found) == least
    assert best_lengths([448, 440, 433], 3) == (448,)


def test_sizes_are_few_hold_all_and_stay_where_they_are_few_already():
    rng, rows = np.random.default_rng(1), (1, 1, 6, 2)
    needed = 16 * 2 ** rng.integers(0, 4, (500, 4))
    assert len(np.unique(needed, axis=0)) > 100
    few = fewest_sizes(needed[:5], rows, 6)
    np.testing.assert_array_equal(few, np.unique(needed[:5], axis=0))
    padding = []
    for most in (1, 6, 30):
        sizes = fewest_sizes(needed, rows, most)
        assert len(sizes) <= most
        fits = (sizes[None] >= needed[:, None]).all(axis=2)
        assert fits.any(axis=1).all()
        padding.append(np.where(fits, sizes @ rows, 10**9).min(axis=1).sum())
    np.testing.assert_array_equal(fewest_sizes(needed, rows, 1), [[128] * 4])
    assert padding == sorted(padding, reverse=True)
    # What is far apart in tokens stays apart: six rows of the third array for one of the first.
    apart = np.array([[16, 16], [32, 16], [16, 128], [32, 128]])
    sizes = fewest_sizes(apart, (1, 6), 2)
    np.testing.assert_array_equal(sizes, [[32, 16], [32, 128]])


def test_pad():
    ids, mask = pad([[1, 2, 3], [4]], pad_id=9, length=4)
    np.testing.assert_array_equal(ids, [[1, 2, 3, 9], [4, 9, 9, 9]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [1, 0, 0, 0]])
    assert pad([[1] * 17], pad_id=0)[0].shape == (1, 32)
    assert pad([[1] * 17], pad_id=0, longest=24)[0].shape == (1, 24)
    assert pad([[1] * 7], pad_id=0, longest=24)[0].shape == (1, 16)
    ids, mask = pad([[], np.array([5, 6], np.int32), []], pad_id=9, length=2)
    np.testing.assert_array_equal(ids, [[9, 9], [5, 6], [9, 9]])
    np.testing.assert_array_equal(mask, [[0, 0], [1, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"."):
        pad([[1, 2, 3]], pad_id=0, length=2)


def test_an_epoch_shows_each_example_at_most_once_and_leaves_out_the_remainder():
    epoch = [batch_indices(0, step, 10, 3) for step in range(3)]
    assert len(set(np.concatenate(epoch).tolist())) == 9
    following = [batch_indices(0, step, 10, 3) for step in range(3, 6)]
    assert np.concatenate(epoch).tolist() != np.concatenate(following).tolist()


def test_the_order_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(batch_indices(1, 7, 100, 8), batch_indices(1, 7, 100, 8))
    assert batch_indices(1, 7, 100, 8).tolist() != batch_indices(2, 7, 100, 8).tolist()
    # Literal, so that a change of library or code that would reorder every run is noticed.
    assert batch_indices(0, 0, 10, 5).tolist() == [0, 7, 8, 6, 9]


def test_too_few_examples():
    with pytest.raises(ValueError, match="do not fill one batch"):
        batch_indices(0, 0, 3, 4)


def test_batches_by_length():
    lengths = np.random.default_rng(0).integers(1, 500, 103)
    for window in (1, 4, 100):
        epoch = [batch_indices(3, step, 103, 8, lengths, window) for step in range(12)]
        assert len(set(np.concatenate(epoch).tolist())) == 96
        same = np.random.Generator(np.random.Philox(key=[3, 0])).permutation(103)[:96]
        sizes = lengths[same]
        # A numpy twin: each window sorted, then cut into batches.
        windows = [np.sort(sizes[i : i + 8 * window]) for i in range(0, 96, 8 * window)]
        expected = sorted(tuple(b) for w in windows for b in w.reshape(-1, 8).tolist())
        assert sorted(tuple(lengths[batch].tolist()) for batch in epoch) == expected
        again = batch_indices(3, 7, 103, 8, lengths, window)
        np.testing.assert_array_equal(epoch[7], again)
    spread = [np.ptp(lengths[batch_indices(3, s, 103, 8, lengths, 100)]) for s in range(12)]
    assert max(spread) < 150  # Lengths go to 500, and a shuffle's batches have nearly all of them.
    longest = [lengths[batch].max() for batch in epoch]
    assert longest != sorted(longest)  # The batches do not come by length themselves.


@pytest.mark.parametrize("lengths", [None, np.arange(10_000) % 97])
@pytest.mark.parametrize("count", [100, 1_000, 10_000])
def test_an_epoch_is_shuffled_once_however_many_steps_it_has(monkeypatch, count, lengths):
    """Shuffled for each step, three million examples would take hours before the first."""
    shuffled, philox = [], np.random.Philox

    def counted(*, key):
        shuffled.append(key)
        return philox(key=key)

    monkeypatch.setattr(np.random, "Philox", counted)
    seed = 77 + (lengths is None)  # No other test has drawn of it.
    for step in range(3 * (count // 10)):
        assert len(batch_indices(seed, step, count, 10, lengths, 4)) == 10
    assert shuffled == [[seed, epoch] for epoch in range(3)]


def test_buckets_of_encoding_double_above_the_longest():
    assert encoding_lengths(100)[-2:] == [96, 100]
    assert encoding_lengths(8192)[-2:] == [4096, 8192]
    assert encoding_lengths(40_000)[-4:] == [8192, 16384, 32768, 40_000]
    assert len(encoding_lengths(2**31 - 1)) < 40
