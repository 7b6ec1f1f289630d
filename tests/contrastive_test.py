"""Step A against sentence-transformers and plain PyTorch on the same weights."""

import functools
import pathlib

import jax
import numpy as np
import optax
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from expandr_jax.contrastive import (
    ContrastiveConfig,
    ContrastiveExample,
    contrastive_loss,
    contrastive_step,
    make_batch,
)
from expandr_jax.train_state import TrainState
from expandr_jax.weights.hf import load_retriever

TINY = str(pathlib.Path(__file__).parent / "data" / "tiny-bert")
QUERIES = ["compute the gradient", "return an array", "scale the norm", "count the steps of a loss"]
DOCUMENTS = ["the gradient of a loss", "array of a shape", "a norm and a clip factor", "step count"]
PASSAGES = [["gradient of parameters"], ["an array, returned"], [], ["count by one"]]
TAU = 0.02


@pytest.fixture(scope="module")
def tiny():
    return load_retriever(TINY)


@pytest.fixture(scope="module")
def peer():
    return SentenceTransformer(TINY, device="cpu").eval()


def batch_of(retriever, samples):
    tokens = [retriever.token_ids(texts) for texts in (QUERIES, DOCUMENTS)]
    passages = [retriever.token_ids(texts) for texts in PASSAGES]
    examples = [
        ContrastiveExample(q, p, d, text)
        for q, p, d, text in zip(tokens[0], passages, tokens[1], DOCUMENTS, strict=True)
    ]
    return make_batch(examples, retriever.tokenizer.pad_token_id, samples)


def embed(peer, texts):
    return peer(peer.preprocess(texts))["sentence_embedding"]


def check_gradients(peer, grads):
    """Gradients of two stacked kernels and the token table equal PyTorch's."""
    layers = peer[0].auto_model.encoder.layer
    pairs = [("q_proj", "attention.self.query"), ("down_proj", "output.dense")]
    for ours, theirs in pairs:
        stacked = [layer.get_submodule(theirs).weight.grad.numpy().T for layer in layers]
        np.testing.assert_allclose(grads["layers"][ours]["kernel"], stacked, rtol=1e-5, atol=1e-5)
    table = peer[0].auto_model.embeddings.word_embeddings.weight.grad.numpy()
    np.testing.assert_allclose(grads["embedding"], table, rtol=1e-5, atol=1e-5)


def test_plain_queries_equal_sentence_transformers(tiny, peer):
    retriever, params = tiny
    config = ContrastiveConfig(temperature=TAU, query_weight=1.0, normalize="both")
    loss_fn = functools.partial(contrastive_loss, retriever=retriever, config=config)
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_of(retriever, 0))

    peer.zero_grad()
    loss_of = MultipleNegativesRankingLoss(peer, scale=1 / TAU)
    features = [peer.preprocess(texts) for texts in (QUERIES, DOCUMENTS)]
    expected = loss_of(features, labels=None)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    check_gradients(peer, grads)


@pytest.mark.parametrize("preset", ["paper", "reference-code"])
def test_expanded_queries_equal_the_formula_in_pytorch(tiny, peer, preset):
    retriever, params = tiny
    paper = preset == "paper"
    config = ContrastiveConfig(
        temperature=TAU if paper else 1.0, query_weight=0.5, normalize="both" if paper else "none"
    )
    loss_fn = functools.partial(contrastive_loss, retriever=retriever, config=config)
    (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch_of(retriever, 1))

    peer.zero_grad()
    queries, documents = embed(peer, QUERIES), embed(peer, DOCUMENTS)
    passages = embed(peer, [texts[0] if texts else "x" for texts in PASSAGES])
    empty = torch.tensor([[not texts] for texts in PASSAGES])
    mixed = torch.where(empty, queries, 0.5 * queries + 0.5 * passages)
    if paper:
        mixed = torch.nn.functional.normalize(mixed, dim=-1)
    scores = mixed @ documents.T / config.temperature
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(len(QUERIES)))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    check_gradients(peer, grads)


def test_a_step_lowers_the_loss_and_keeps_the_caller_s_weights(tiny):
    retriever, params = tiny
    before = np.array(params["embedding"])
    optimizer = optax.adam(1e-3)
    config = ContrastiveConfig(temperature=TAU, query_weight=0.5, normalize="both")
    step = jax.jit(
        functools.partial(
            contrastive_step, retriever=retriever, config=config, optimizer=optimizer
        ),
        donate_argnums=0,
    )
    state, losses = TrainState.create(params, optimizer), []
    for _ in range(10):
        state, metrics = step(state, batch_of(retriever, 1))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2
    np.testing.assert_array_equal(params["embedding"], before)
