"""What exact search reads of the corpus, and what stays on the devices."""

import jax
import numpy as np
import pytest

from expandr_jax import search
from expandr_jax.search import exact
from tests.search_test import _by_numpy, _clustered, _vectors


class Counted(np.ndarray):
    """Vectors that count how many of them are read."""

    read = 0

    def __getitem__(self, rows):
        part = np.asarray(self)[rows]
        Counted.read += len(part)
        return part


@pytest.mark.parametrize(("kept", "again"), [(0, 400), (1, 0), (3, 0)])
def test_exact_reads_once_what_stays_on_the_devices(monkeypatch, kept, again):
    monkeypatch.setattr(exact, "shares_memory", lambda device: False)
    vectors, queries = _clustered(400), _clustered(40, seed=1)
    index = search.build_index(vectors.view(Counted), "exact", block_rows=50, resident_mib=kept)
    Counted.read = 0
    first = index.search(queries, 20)
    assert Counted.read == 400
    for found, expected in zip(index.search(queries, 20), first, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert Counted.read == 400 + again


def test_exact_keeps_no_more_on_a_device_than_it_may(monkeypatch):
    monkeypatch.setattr(exact, "shares_memory", lambda device: False)
    vectors = np.ones((24 * 512, 256), np.float32)  # Blocks of half a MiB.
    index = search.ExactIndex(
        vectors.view(Counted),
        search.ExactOptions(block_rows=512, resident_mib=1),
        jax.devices()[:4],
    )
    index.search(vectors[:1], 3)
    Counted.read = 0
    index.search(vectors[:1], 3)
    assert Counted.read == (24 - 4 * 2) * 512


def test_one_pass_serves_many_queries_and_no_more_than_fit(monkeypatch):
    monkeypatch.setattr(exact, "_BATCHES", 3)
    vectors, queries = _vectors(40), _vectors(50, seed=1)
    index = search.build_index(vectors.view(Counted), "exact", query_rows=8)
    Counted.read = 0
    found = index.search(queries, 5)
    assert Counted.read == 40 * 3  # Seven batches.
    np.testing.assert_array_equal(found[1], _by_numpy(vectors, queries, 5)[1])
