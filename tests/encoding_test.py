"""Texts to vectors: as sentence-transformers, whatever the order, the batch and the devices."""

import dataclasses
import pathlib
import tracemalloc

import jax
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.models.retriever import Retriever
from expandr_jax.serving.queries import QueryEncoder
from expandr_jax.sharding import batch_sharding, make_mesh
from expandr_jax.vectors import encoder as vectors_encoder
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


def test_a_batch_is_on_its_devices_before_a_program_has_it(tiny, monkeypatch):
    """From several processes, each with several devices, JAX takes no arrays of a host there."""
    retriever, params = tiny
    two, seen = encoder(retriever, 2), []

    def embed(_, *arrays):
        seen.extend(arrays)
        return np.zeros((len(arrays[0]), 32), np.float32)

    monkeypatch.setattr(two, "_embed", embed)
    two.encode(params, TEXTS, "document")
    assert seen
    for array in seen:
        assert isinstance(array, jax.Array)
        assert array.sharding.is_equivalent_to(batch_sharding(two.mesh), 2)


def test_queries_are_cut_to_a_length_of_their_own(tiny):
    _, params = tiny
    plain = load_retriever(TINY, query_prompt="find: ", document_prompt="read: ")[0]
    short = load_retriever(
        TINY, query_prompt="find: ", document_prompt="read: ", query_length=9, max_length=32
    )[0]
    text = "the gradient of a loss and a norm " * 3
    documents = encoder(short).tokenize([text, "a loss"], "document")
    assert [len(ids) for ids in documents] == [32, len(plain.token_ids(["read: a loss"])[0])]
    whole, (cut,) = plain.token_ids(["find: " + text])[0], encoder(short).tokenize([text], "query")
    assert cut == [*whole[:8], whole[-1]]  # The end's special token stays.
    counted = []
    vector = encoder(short).encode(params, [text, "a loss"], "query", cut=counted.extend)[0]
    assert counted == [True, False]
    ids = np.array([cut])
    np.testing.assert_allclose(vector, short.embed(params, ids, np.ones_like(ids))[0], atol=1e-5)
    served = QueryEncoder(short, params).encode([text], ["query"])[0]
    np.testing.assert_allclose(served, vector, atol=1e-6)
    assert short.identity != dataclasses.replace(short, query_length=0).identity


def test_few_texts_are_tokenized_at_once(tiny, monkeypatch):
    """What the tokenizer says of a text beside its ids is fifty times as large as the text."""
    retriever, at_once, lost = tiny[0], [], []
    whole = retriever.token_ids(TEXTS, "document", lost.extend)

    def tokenizer(texts, **options):
        at_once.append(len(texts))
        return retriever.tokenizer(texts, **options)

    monkeypatch.setattr("expandr_jax.models.retriever.TOKENIZED", 7)
    counted = dataclasses.replace(retriever, tokenizer=tokenizer)
    cut = []
    assert counted.token_ids(TEXTS, "document", cut.extend) == whole
    assert at_once == [7, 7, 7, 4]
    assert cut == lost
    assert len(cut) == len(TEXTS)


def test_a_query_length_that_holds_no_query_is_refused():
    with pytest.raises(UserError, match="query_length is 2; expected more than the 2 tokens"):
        load_retriever(TINY, query_length=2)


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


def test_a_block_of_texts_is_tokenised_at_once(tiny, monkeypatch):
    """Token ids of 200 texts take ten times the memory of their vectors here."""
    retriever, params = tiny
    texts = [f"scale the gradient of array {i} " * 6 for i in range(200)]
    whole = encoder(retriever).encode(params, texts, "document")
    asked, peaks = [], []
    real = Retriever.token_ids
    monkeypatch.setattr(vectors_encoder, "TEXTS_AT_ONCE", 16)
    monkeypatch.setattr(
        Retriever, "token_ids", lambda self, t, *a: asked.append(len(t)) or real(self, t, *a)
    )
    blocks = encoder(retriever)
    for count in (50, 100, 200):
        tracemalloc.start()
        vectors = blocks.encode(params, texts[:count], "document")
        peaks.append(tracemalloc.get_traced_memory()[1] - vectors.nbytes)
        tracemalloc.stop()
        np.testing.assert_array_equal(vectors, whole[:count])
    assert max(asked) == 16
    assert max(peaks[1:]) < 1.3 * min(peaks[1:])


def test_a_vector_that_is_not_finite_is_named_in_any_block(tiny, monkeypatch):
    retriever, params = tiny
    monkeypatch.setattr(vectors_encoder, "TEXTS_AT_ONCE", 2)
    texts = ["an array", "a norm", "a loss", "scale"]
    (row,) = retriever.token_ids(["scale"])
    word = row[1]
    broken = {**params, "embedding": params["embedding"].at[word].set(np.nan)}
    with pytest.raises(NotFiniteError, match=r"text 3 \('scale'\)") as caught:
        encoder(retriever).encode(broken, texts, "query")
    assert caught.value.row == 3
