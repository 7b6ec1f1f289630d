"""Texts to vectors: as sentence-transformers, whatever the order, the batch and the devices."""

import pathlib

import jax
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from expandr_jax.errors import UserError
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_retriever

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
TEXTS = ["an array", "", "a loss " * 30, "scale", "the gradient of a loss and a norm " * 3] * 5


@pytest.fixture(scope="module")
def tiny():
    return load_retriever(TINY)


def encoder(retriever, devices=1):
    mesh = make_mesh(devices=jax.devices()[:devices])
    return TextEncoder(retriever, mesh, tokens_per_batch=256)


def test_vectors_equal_sentence_transformers(tiny):
    retriever, params = tiny
    ours = encoder(retriever).encode(params, TEXTS, "document")
    theirs = SentenceTransformer(TINY, device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_text_s_vector_depends_on_the_text_alone(tiny):
    retriever, params = tiny
    together = encoder(retriever).encode(params, TEXTS, "document")
    for i in (0, 2, 4):
        alone = encoder(retriever).encode(params, [TEXTS[i]], "document")
        np.testing.assert_array_equal(alone[0], together[i])


def test_eight_devices_give_the_same_vectors(tiny):
    retriever, params = tiny
    one = encoder(retriever).encode(params, TEXTS, "document")
    eight = encoder(retriever, 8).encode(params, TEXTS, "document")
    np.testing.assert_allclose(one, eight, atol=1e-6)


def test_progress_counts_every_text(tiny):
    retriever, params = tiny
    seen = []
    encoder(retriever).encode(params, TEXTS, "document", seen.append)
    assert sum(seen) == len(TEXTS)


def test_no_texts(tiny):
    retriever, params = tiny
    assert len(encoder(retriever).encode(params, [], "query")) == 0


def test_damaged_weights_are_named(tiny):
    retriever, params = tiny
    broken = {**params, "embedding": params["embedding"].at[:].set(np.nan)}
    with pytest.raises(UserError, match="not finite"):
        encoder(retriever).encode(broken, ["text"], "query")
