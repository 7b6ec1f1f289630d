"""Step A against sentence-transformers and plain PyTorch on the same weights."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from expandr_jax.losses.contrastive import same_text
from expandr_jax.models.bert import BertConfig
from expandr_jax.models.encoder import Encoder
from expandr_jax.objectives import contrastive
from expandr_jax.objectives.contrastive import (
    ContrastiveConfig,
    contrastive_gradients,
    contrastive_loss,
    contrastive_step,
)
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.sharding import batch_sharding, make_mesh, on_mesh
from expandr_jax.training.train_state import TrainState
from expandr_jax.weights.hf import load_retriever

TINY = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny" / "tiny-bert")
QUERIES = ["compute the gradient", "return an array", "scale the norm", "count the steps of a loss"]
DOCUMENTS = ["the gradient of a loss", "array of a shape", "a norm and a clip factor", "step count"]
PASSAGES = [["gradient of parameters"], ["an array, returned"], [], ["count by one"]]
TAU = 0.02
# Query 0 has two; query 1 has one, and query 2's document is relevant to it, too; query 2 has
# none; query 3 has query 0's document, which counts against all but query 0.
NEGATIVES = [["a clip factor", "return an array"], ["a shape"], [], [DOCUMENTS[0], "the step"]]
KNOWN = [(), (DOCUMENTS[2],), (), ()]
PLAIN = ContrastiveConfig(temperature=0.1, query_weight=1.0, normalize="both")
EVERYTHING = ContrastiveConfig(
    temperature=0.1,
    query_weight=0.5,
    normalize="both",
    learn_temperature=True,
    symmetric=True,
    margin_mse_weight=0.3,
    kl_weight=0.5,
    teacher_temperature=2.0,
    invariance_weight=0.7,
    dimensions=(8, 32),
)


@pytest.fixture(scope="module")
def tiny():
    return load_retriever(TINY)


@pytest.fixture(scope="module")
def peer():
    # In double precision: at tau 0.02 the rounding of both sides would come to 1e-5.
    return SentenceTransformer(TINY, device="cpu").eval().double()


def batch_of(retriever, samples):
    tokens = [retriever.token_ids(texts) for texts in (QUERIES, DOCUMENTS)]
    passages = [retriever.token_ids(texts) for texts in PASSAGES]
    examples = [
        ContrastiveExample(q, p, Passage(d, text))
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
    gradients = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = jax.jit(gradients)(params, batch_of(retriever, 0))

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
    gradients = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, _), grads = jax.jit(gradients)(params, batch_of(retriever, 1))

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


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_the_invariance_term_equals_pytorch(tiny, peer, micro_batch):
    """The divergence of the plain queries' distribution over documents from the expanded ones'."""
    retriever, params = tiny
    config = ContrastiveConfig(
        temperature=0.1, query_weight=0.5, normalize="both", info_nce_weight=0.0,
        invariance_weight=0.7, micro_batch=micro_batch,
    )  # fmt: skip
    batch = batch_of(retriever, 1)
    gradients = functools.partial(contrastive_gradients, retriever=retriever, config=config)
    (loss, _), grads = jax.jit(gradients)(params, batch)

    peer.zero_grad()
    queries, documents = embed(peer, QUERIES), embed(peer, DOCUMENTS)
    passages = embed(peer, [texts[0] if texts else "x" for texts in PASSAGES])
    empty = torch.tensor([[not texts] for texts in PASSAGES])
    mixed = torch.nn.functional.normalize(torch.where(empty, queries, queries + passages), dim=-1)
    expanded, plain = (torch.log_softmax(q @ documents.T / 0.1, -1) for q in (mixed, queries))
    each = torch.nn.functional.kl_div(plain, expanded, log_target=True, reduction="none").sum(-1)
    assert abs(each[2]) < 1e-12  # It has no expansion.
    expected = 0.7 * each.mean()
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    check_gradients(peer, grads)
    assert peer[0].auto_model.embeddings.word_embeddings.weight.grad.abs().max() > 1e-2
    without = dataclasses.replace(config, invariance_weight=0.0)
    assert contrastive_loss(params, batch, retriever=retriever, config=without)[0] == 0
    plain_batch = batch_of(retriever, 0)
    assert contrastive_loss(params, plain_batch, retriever=retriever, config=config)[0] == 0


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


def examples_with_negatives(retriever, repeats=1):
    """The four queries `repeats` times over, told apart by a word."""

    def ids(text):
        return retriever.token_ids([text])[0]

    examples = []
    for copy in range(repeats):
        mark = f" {copy}" if copy else ""
        for i, query in enumerate(QUERIES):
            scores = np.random.default_rng([copy, i]).normal(size=3).tolist()
            examples.append(
                ContrastiveExample(
                    query=ids(query + mark),
                    expansions=[ids(text + mark) for text in PASSAGES[i]],
                    positive=Passage(ids(DOCUMENTS[i] + mark), DOCUMENTS[i] + mark, scores[0]),
                    negatives=[
                        Passage(ids(text + mark), text + mark, score)
                        for text, score in zip(NEGATIVES[i], scores[1:], strict=False)
                    ],
                    known=[text + mark for text in KNOWN[i]],
                )
            )
    return examples


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_given_negatives_equal_pytorch(tiny, peer, micro_batch):
    retriever, params = tiny
    batch = make_batch(examples_with_negatives(retriever), 0, 0, negatives=2)
    config = dataclasses.replace(PLAIN, micro_batch=micro_batch)
    gradients = functools.partial(contrastive_gradients, retriever=retriever, config=config)
    (loss, _), grads = jax.jit(gradients)(params, batch)

    peer.zero_grad()
    texts = DOCUMENTS + [text for row in NEGATIVES for text in row]
    scores = embed(peer, QUERIES) @ embed(peer, texts).T / PLAIN.temperature
    for i in range(4):
        right = {DOCUMENTS[i], *KNOWN[i]}
        for j, text in enumerate(texts):
            if text in right and j != i:
                scores[i, j] = -torch.inf
    assert torch.isinf(scores).sum() == 2
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(4))
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), atol=1e-5)
    check_gradients(peer, grads)


def test_another_right_passage_in_the_batch_is_no_negative(tiny):
    retriever, _ = tiny
    examples = examples_with_negatives(retriever)
    examples[3] = dataclasses.replace(
        examples[3], other_positives=[Passage([1], DOCUMENTS[1]), Passage([1], "a shape")]
    )
    batch = make_batch(examples, 0, 0, negatives=2)
    # Columns: four documents, then two negatives a query; query 1 lacks its second, query 2 both.
    texts = np.concatenate([batch["positive_texts"], batch["negative_texts"]])
    found = np.asarray(same_text(texts, batch["relevant"]))
    assert np.flatnonzero(found[3]).tolist() == [1, 3, 6]
    assert np.flatnonzero(~batch["given"][:, 1:].ravel()).tolist() == [3, 4, 5]
    excluded = found.copy()
    excluded[:, 4:] |= ~batch["given"][:, 1:].ravel()
    assert np.flatnonzero(excluded[3]).tolist() == [1, 3, 6, 7, 8, 9]


class Bag(Encoder):
    """A module with dropout that compiles in no time."""

    config: BertConfig = BertConfig(300, 32, 1, 1, 32, 64)

    @nn.compact
    def __call__(self, ids, mask, *, deterministic=True):
        x = nn.Dropout(0.1)(nn.Embed(300, 32)(ids), deterministic=deterministic)
        return jnp.tanh(nn.Dense(32)(x))


@pytest.fixture(scope="module")
def bag(tiny):
    ids = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(Bag().init)(jax.random.key(0), ids, ids)["params"]
    return dataclasses.replace(tiny[0], module=Bag()), params


def parameters(params, config):
    if not config.learn_temperature:
        return params
    return {"retriever": params, "log_temperature": np.log(np.float32(config.temperature))}


def close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)


@pytest.mark.parametrize(
    ("config", "micro_batch"), [(PLAIN, 0), (EVERYTHING, 8)], ids=["plain", "everything, cached"]
)
def test_eight_devices_and_micro_batches_give_the_same_gradients(bag, config, micro_batch):
    retriever, params = bag
    params = parameters(params, config)
    batch = make_batch(examples_with_negatives(retriever, repeats=4), 0, 1, negatives=2)
    gradients = functools.partial(contrastive_gradients, retriever=retriever)
    whole = jax.jit(functools.partial(gradients, config=config))(params, batch)
    cached = dataclasses.replace(config, micro_batch=micro_batch)
    rows = batch_sharding(make_mesh())
    step = jax.jit(functools.partial(gradients, config=cached), in_shardings=(None, rows))
    close(step(params, batch), whole)


@pytest.mark.parametrize("config", [PLAIN, pytest.param(EVERYTHING, marks=pytest.mark.slow)])
def test_scores_in_parts_give_the_same_gradients(bag, config, monkeypatch):
    """On one device and on eight; a part has eight of the 24 queries."""
    retriever, params = bag
    params = parameters(params, config)
    batch = make_batch(examples_with_negatives(retriever, repeats=6), 0, 1, negatives=2)
    config = dataclasses.replace(config, micro_batch=8)
    gradients = functools.partial(contrastive_gradients, retriever=retriever, config=config)
    whole = jax.jit(gradients)(params, batch)
    monkeypatch.setattr(contrastive, "SCORE_BYTES", 0)
    for mesh in (make_mesh(1, devices=jax.devices()[:1]), make_mesh()):
        rows = batch_sharding(mesh)
        parts = jax.jit(on_mesh(mesh, gradients), in_shardings=(None, rows))
        text = parts.lower(params, batch).as_text()
        assert "<8x72xf32>" in text  # The scores of all passages.
        assert "<24x72xf32>" not in text
        close(parts(params, batch), whole)


def test_scores_take_the_memory_of_a_part(bag, monkeypatch):
    """Whole, they and their masks would grow with the square of the batch."""
    retriever, params = bag
    monkeypatch.setattr(contrastive, "SCORE_BYTES", 0)
    gradients = functools.partial(
        contrastive_gradients, retriever=retriever, config=dataclasses.replace(PLAIN, micro_batch=8)
    )
    row = make_batch(examples_with_negatives(retriever), 0, 0, negatives=2)

    def temporary_bytes(queries):
        shapes = {
            name: jax.ShapeDtypeStruct((len(x) * queries // 4, *x.shape[1:]), x.dtype)
            for name, x in row.items()
        }
        compiled = jax.jit(gradients).lower(params, shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    sizes = 256, 512, 1024
    found = [temporary_bytes(queries) for queries in sizes]
    assert found[2] - found[1] < 2.5 * (found[1] - found[0])
    # A vector of 32 floats a text, several times over; scores of all would be 12 KB a query.
    assert (found[2] - found[1]) / 512 < 6_000


def test_micro_batches_drop_the_same_in_both_passes(bag):
    retriever, params = bag
    batch = make_batch(examples_with_negatives(retriever, repeats=2), 0, 0, negatives=2)
    settings = {
        "retriever": retriever,
        "config": dataclasses.replace(PLAIN, micro_batch=4),
    }
    whole = jax.jit(jax.value_and_grad(functools.partial(contrastive_loss, **settings), 0, True))
    cached = jax.jit(functools.partial(contrastive_gradients, **settings))
    keys = [jax.random.key(seed) for seed in (1, 2)]
    results = [cached(params, batch, dropout_key=key) for key in keys]
    close(results[0], whole(params, batch, dropout_key=keys[0]))
    assert abs(results[0][0][0] - results[1][0][0]) > 1e-4


def test_micro_batches_take_the_memory_of_one(bag):
    retriever, params = bag
    gradients = functools.partial(contrastive_gradients, retriever=retriever)

    def temporary_bytes(repeats, micro_batch):
        batch = make_batch(examples_with_negatives(retriever, repeats), 0, 0, negatives=1)
        config = dataclasses.replace(PLAIN, micro_batch=micro_batch)
        compiled = jax.jit(functools.partial(gradients, config=config)).lower(params, batch)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    small, large = temporary_bytes(4, 8), temporary_bytes(16, 8)
    assert large - small < (temporary_bytes(16, 0) - temporary_bytes(4, 0)) / 5


def test_a_learned_temperature_moves_and_stays_above_its_floor(bag):
    retriever, params = bag
    config = dataclasses.replace(PLAIN, learn_temperature=True)
    params = parameters(params, config)
    batch = make_batch(examples_with_negatives(retriever), 0, 0)
    gradients = functools.partial(contrastive_gradients, retriever=retriever, config=config)

    def loss_at(log_temperature):
        moved = {**params, "log_temperature": np.float32(log_temperature)}
        return float(contrastive_loss(moved, batch, retriever=retriever, config=config)[0])

    (_, metrics), grads = gradients(params, batch)
    np.testing.assert_allclose(metrics["temperature"], 0.1, rtol=1e-6)
    slope = (loss_at(np.log(0.1) + 0.01) - loss_at(np.log(0.1) - 0.01)) / 0.02
    np.testing.assert_allclose(grads["log_temperature"], slope, rtol=1e-2)
    assert loss_at(np.log(0.001)) == loss_at(np.log(0.01))


def test_a_learned_temperature_leaves_its_floor(bag):
    """At the floor, and below it as older code could come to be, the gradient moves it up."""
    retriever, config = bag[0], dataclasses.replace(PLAIN, learn_temperature=True)
    step = functools.partial(contrastive_step, retriever=retriever, config=config)
    batch = make_batch(examples_with_negatives(retriever), 0, 0)
    floor = np.float32(np.log(0.01))
    for start in (floor, floor - 1):
        params = {**parameters(bag[1], config), "log_temperature": start}
        (_, metrics), grads = contrastive_gradients(
            params, batch, retriever=retriever, config=config
        )
        np.testing.assert_allclose(metrics["temperature"], 0.01, rtol=1e-6)
        assert grads["log_temperature"] < -1  # Of random vectors: a higher one has less loss.
    for rate in (1e-3, -1e3):  # Where the gradient leads below it, the parameter stays there.
        optimizer = optax.sgd(rate)
        state = TrainState.create({**params, "log_temperature": floor}, optimizer)
        after = step(state, batch, optimizer=optimizer)[0].params["log_temperature"]
        assert after > floor if rate > 0 else after == floor
