"""Masks against the rule, pair by pair."""

import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.models.mask import Mask, causal_mask, padding_mask

SEGMENTS = np.array([[1, 1, 2, 2, 3, 0], [0, 1, 1, 1, 2, 3]])


def allowed(segments, row, query, key, causal):
    """What the class promises, for one pair of places."""
    own, other = segments[row, query], segments[row, key]
    return other != 0 and other in (1, own) and not (causal and key > query)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", [6, 4])
def test_each_pair_is_judged_by_segment_and_place(causal, queries):
    mask = Mask(jnp.asarray(SEGMENTS), causal=causal, responses=2)
    found = np.asarray(mask.dense(queries))
    for row, query, key in np.ndindex(2, queries, 6):
        query_place = query + 6 - queries
        if SEGMENTS[row, query_place]:
            expected = allowed(SEGMENTS, row, query_place, key, causal)
            assert found[row, query, key] == expected, (row, query, key)


def test_masks_of_batches_leave_padding_out():
    attention_mask = jnp.asarray([[1, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(padding_mask(attention_mask).dense(3), [[[1, 1, 0]], [[0, 1, 1]]])
    np.testing.assert_array_equal(
        causal_mask(attention_mask).dense(3),
        [[[1, 0, 0], [1, 1, 0], [1, 1, 0]], [[0, 0, 0], [0, 1, 0], [0, 1, 1]]],
    )


def test_what_came_before_is_seen_by_all():
    mask = causal_mask(jnp.asarray([[1, 1, 0]])).after(2)
    expected = [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]]
    np.testing.assert_array_equal(mask.dense(3), expected)


def test_a_window_counts_positions_and_can_be_left_out():
    # The last two tokens continue the first two: their positions are 2 and 3 as well.
    positions = jnp.asarray([[0, 1, 2, 3, 2, 3]])
    segments = jnp.asarray([[1, 1, 2, 2, 3, 3]])
    mask = Mask(segments, causal=True, responses=2).prepared(6).within(3, positions, positions)
    near = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 1, 0, 0, 1, 1],
    ]
    whole = np.array(near)
    whole[[3, 5], 0] = 1
    for windowed in (None, True, jnp.asarray(True)):
        np.testing.assert_array_equal(mask.replace(windowed=windowed).dense(6)[0], near)
    for windowed in (False, jnp.asarray(False)):
        np.testing.assert_array_equal(mask.replace(windowed=windowed).dense(6)[0], whole)
