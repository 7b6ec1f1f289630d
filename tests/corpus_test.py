"""Texts and a corpus as vectors and as an index, as a run has them."""

import io
import pathlib
import types

import numpy as np
import pytest
from rich.console import Console

from configs import base, smoke
from expandr_jax.config import read_config
from expandr_jax.errors import NotFiniteError
from expandr_jax.runtime.run import Run
from expandr_jax.search import ExactIndex, ScannIndex, scann
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_retriever
from train.encoding import run_retriever

needs_scann = pytest.mark.skipif(not scann.installed(), reason="there is no ScaNN wheel")
VECTORS = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
TEXTS = {"d-first": "the loss of an array", "d-bad": "a gradient", "d-last": "the array"}


@pytest.fixture(scope="module")
def model():
    """A retriever, with weights that make no finite vector of "a gradient" alone."""
    retriever, params = load_retriever(TINY, max_length=16)
    models = types.SimpleNamespace(encoder=TextEncoder(retriever, make_mesh()))
    ids = {
        name: set(tokens)
        for name, tokens in zip(TEXTS, retriever.token_ids([*TEXTS.values()], ""), strict=True)
    }
    bad = sorted(ids["d-bad"] - ids["d-first"] - ids["d-last"])
    return models, {**params, "embedding": params["embedding"].at[np.array(bad)].set(np.nan)}


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path / "run", read_config(smoke.get_config()), Console(file=io.StringIO()))
    run.last_good = "step 7 somewhere"
    yield run
    run.close()


def test_a_document_without_a_finite_vector_is_named_with_the_last_checkpoint(model, run):
    models, params = model
    with (
        pytest.raises(
            NotFiniteError,
            match=r"^document d-bad: .*zero-shot.npy.part.*'a gradient'.*not finite;.*"
            r"The last good checkpoint: step 7 somewhere$",
        ),
        run.phase("encode"),
    ):
        _ = run_retriever(run, models, TEXTS, params, "zero-shot").corpus


def test_a_query_without_a_finite_vector_is_named(model, run):
    models, params = model
    retriever = run_retriever(run, models, TEXTS, params, "zero-shot")
    with pytest.raises(NotFiniteError, match=r"^d-bad: text 1 .'a gradient'.: .*not finite"):
        retriever.encode(list(TEXTS.values()), "query", list(TEXTS))
    with pytest.raises(NotFiniteError, match=r"^text 1 .'a gradient'.: .*not finite"):
        retriever.encode(list(TEXTS.values()), "query")


def section(**settings):
    config = base.get_config()
    config.update_from_flattened_dict(settings)
    return read_config(config).search


@needs_scann
@pytest.mark.parametrize("backend", ["auto", "scann"])
def test_scann_has_its_options(backend):
    settings = {"search.backend": backend, "search.scann.method": "tree",
                "search.scann.leaves": 3, "search.exact.block_rows": 7}  # fmt: skip
    index = Corpus([], VECTORS, section(**settings)).index
    assert isinstance(index, ScannIndex)
    assert (index.method, index.leaves) == ("tree", 3)


def test_exact_search_has_its_own():
    settings = {"search.backend": "exact", "search.scann.method": "tree",
                "search.exact.block_rows": 7}  # fmt: skip
    index = Corpus([], VECTORS, section(**settings)).index
    assert isinstance(index, ExactIndex)
    assert index.options.block_rows == 7
