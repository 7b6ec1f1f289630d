"""Texts and a corpus as vectors, as a run has them: what is wrong is named by its id."""

import io
import pathlib
import types

import numpy as np
import pytest
from rich.console import Console

from configs import smoke
from expandr_jax.encoding import TextEncoder
from expandr_jax.errors import NotFiniteError
from expandr_jax.sharding import make_mesh
from expandr_jax.weights.hf import load_retriever
from train.corpus import encode_corpus, encode_texts
from train.run import Run

TINY = str(pathlib.Path(__file__).parent / "data" / "tiny-bert")
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
    run = Run(tmp_path / "run", smoke.get_config(), Console(file=io.StringIO()))
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
        encode_corpus(run, models, TEXTS, "zero-shot", params)


def test_a_query_without_a_finite_vector_is_named(model, run):
    models, params = model
    with pytest.raises(NotFiniteError, match=r"^d-bad: text 1 .'a gradient'.: .*not finite"):
        encode_texts(run, models, params, list(TEXTS.values()), "query", ids=list(TEXTS))
    with pytest.raises(NotFiniteError, match=r"^text 1 .'a gradient'.: .*not finite"):
        encode_texts(run, models, params, list(TEXTS.values()), "query")
