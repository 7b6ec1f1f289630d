"""The index of a corpus is the one that the config's `search` section asks for."""

import ml_collections
import numpy as np
import pytest

from configs import base
from expandr_jax.search import ExactIndex, ExactOptions, ScannIndex, scann
from train.corpus import configured_index

needs_scann = pytest.mark.skipif(not scann.installed(), reason="there is no ScaNN wheel")
VECTORS = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)


def section(**settings):
    config = base.get_config()
    config.update_from_flattened_dict(settings)
    return config.search


@needs_scann
@pytest.mark.parametrize("backend", ["auto", "scann"])
def test_scann_has_its_options(backend):
    index = configured_index(
        VECTORS,
        section(**{"search.backend": backend, "search.scann.method": "tree",
                   "search.scann.leaves": 3, "search.exact.block_rows": 7}),
    )  # fmt: skip
    assert isinstance(index, ScannIndex)
    assert (index.method, index.leaves) == ("tree", 3)


def test_exact_search_has_its_own():
    settings = {"search.backend": "exact", "search.scann.method": "tree",
                "search.exact.block_rows": 7}  # fmt: skip
    index = configured_index(VECTORS, section(**settings))
    assert isinstance(index, ExactIndex)
    assert index._options.block_rows == 7


def test_a_run_from_before_there_were_options():
    index = configured_index(VECTORS, ml_collections.ConfigDict({"backend": "exact"}))
    assert index._options == ExactOptions()
