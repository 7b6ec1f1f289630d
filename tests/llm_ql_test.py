"""Query likelihood: equal to PyTorch's, by its end token alone, drawn by seed and step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from sentence_transformers import SentenceTransformer

from configs import base, smoke
from eval import tiny_models
from expandr_jax.config import read_config
from expandr_jax.data.batches import pad
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_jsonl
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.models.mask import Mask
from expandr_jax.objectives import llm_ql
from expandr_jax.objectives.contrastive import (
    ContrastiveConfig,
    contrastive_gradients,
    contrastive_setup,
)
from expandr_jax.objectives.contrastive_batches import ContrastiveExample, Passage, make_batch
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
from expandr_jax.objectives.llm_ql import (
    Corruption,
    corruption_of,
    likelihood_mask,
    query_losses,
)
from expandr_jax.objectives.trained import divided
from expandr_jax.planning.planned_retriever import RetrieverShapes
from expandr_jax.sharding import make_mesh
from expandr_jax.weights.hf import load_retriever
from tests.eight_devices import machine
from tests.retriever_training_test import PAIRS, TINY, config_of, read_rows, train

TINY_LLAMA = TINY.replace("bert", "llama")
DOCUMENTS, QUERIES = [[20, 21, 22, 23, 2], [24, 25, 2]], [[40, 41], [42, 43, 44]]
WORDS = [20, 21, 22, 23, 24, 25]  # None of them is in a query.


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An untied model: PyTorch's, and ours with its head."""
    directory = tmp_path_factory.mktemp("llama")
    reference = tiny_models.save(directory, "llama", head=True)
    options = {"pooling": "last", "normalize": True, "end_token": True, "with_head": True}
    return reference, *load_retriever(str(directory), **options)


def batch_of(documents=DOCUMENTS, queries=QUERIES, corrupted=None):
    examples = [
        ContrastiveExample(query, [], Passage(document, f"text {i}"))
        for i, (document, query) in enumerate(zip(documents, queries, strict=True))
    ]
    batch = make_batch(examples, 0, 0)
    length = batch["positive_ids"].shape[1]
    batch["corrupted_ids"] = pad(corrupted or documents, 0, length)[0]
    return batch


def of_pytorch(model, document, query, blocked):
    """Mean -log p of a query's tokens, from a mask that is written out."""
    tokens = [*document, *query]
    sees = np.tril(np.ones((len(tokens), len(tokens)), bool))
    if blocked:
        sees[len(document) :, : len(document) - 1] = False
    mask = torch.where(torch.from_numpy(sees), 0.0, float("-inf"))[None, None]
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), attention_mask=mask).logits[0].double().numpy()
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    first = len(document) - 1
    return -np.mean([logs[first + i, token] for i, token in enumerate(query)])


class Table:
    """Stands for a decoder whose tokens see nothing: a state is a row, logits are its products."""

    def states(self, params, tokens, *_, **__):
        return params[tokens]

    def logits(self, params, hidden):
        return hidden @ params.T


def test_a_token_is_foretold_by_the_one_before_it_and_the_first_by_the_end():
    table = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    corrupted = [[20, 9, 9, 23, 2], [9, 25, 1]]
    found = query_losses(table, batch_of(corrupted=corrupted), retriever=Table())
    for loss, document, query in zip(found, corrupted, QUERIES, strict=True):
        logits = (table[[document[-1], *query[:-1]]] @ table.T).astype(np.float64)
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        expected = -np.mean([row[token] for row, token in zip(logs, query, strict=True)])
        np.testing.assert_allclose(loss, expected, atol=1e-5)


@pytest.mark.parametrize("blocked", [True, False])
def test_a_query_sees_itself_and_of_its_document_the_end(blocked):
    documents, queries = np.array([[1, 1, 1, 0], [1, 1, 1, 1]]), np.array([[1, 1], [1, 0]])
    mask, ends = likelihood_mask(documents, queries, blocked=blocked)
    assert ends.tolist() == [2, 3]
    for row, end in enumerate(ends.tolist()):
        real = [*documents[row], *queries[row]]
        for place in range(6):
            words = {k for k in range(4) if place < 4 or not blocked or k == end} | {4, 5}
            seen = [k for k in range(place + 1) if real[k] and k in words]
            assert np.flatnonzero(mask.array[row, place]).tolist() == seen


@pytest.mark.slow
@pytest.mark.parametrize("blocked", [True, False])
def test_losses_equal_pytorch(tiny, blocked):
    reference, retriever, params = tiny
    corrupted = [[20, 9, 9, 23, 2], [9, 25, 2]]
    batch = batch_of(corrupted=corrupted)
    found = query_losses(params, batch, retriever=retriever, blocked=blocked)
    pairs = zip(corrupted, QUERIES, strict=True)
    expected = [of_pytorch(reference, *pair, blocked) for pair in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # All tokens are alike to a head of zeros.
    even = {**params, "lm_head": jnp.zeros_like(params["lm_head"])}
    found = query_losses(even, batch, retriever=retriever, blocked=blocked)
    np.testing.assert_allclose(found, 4.564348, atol=1e-5)  # log 96


@pytest.mark.slow
def test_no_path_leads_from_words_to_the_query_but_through_the_end_token(tiny, monkeypatch):
    _, retriever, params = tiny
    batch = batch_of()

    @jax.jit  # One program, whatever the mask.
    def slopes(allowed):
        """How the loss depends on the embeddings of the documents' words."""
        end = likelihood_mask(batch["positive_mask"], batch["query_mask"])[1]
        altered = Mask(array=allowed), end
        with monkeypatch.context() as patch:
            patch.setattr(llm_ql, "likelihood_mask", lambda *_, **__: altered)
            losses = lambda p: jnp.sum(query_losses(p, batch, retriever=retriever))  # noqa: E731
            grads = jax.grad(losses)(params)
        return jnp.abs(grads["embedding"])[jnp.array(WORDS)].max(axis=1)

    def masks(blocked):
        """As it is, and with end tokens that see nothing of their documents."""
        mask, end = likelihood_mask(batch["positive_mask"], batch["query_mask"], blocked=blocked)
        place = jnp.arange(mask.array.shape[1])
        words = (place[:, None] == end[:, None, None]) & (place < end[:, None, None])
        return mask.array, mask.array & ~words

    seen, blind = masks(blocked=True)
    assert (slopes(seen) > 1e-5).all()
    assert (slopes(blind) == 0).all()
    assert (slopes(masks(blocked=False)[1]) > 1e-5).all()


@pytest.mark.slow
def test_rows_are_as_they_would_be_alone(tiny):
    _, retriever, params = tiny
    together = query_losses(params, batch_of(), retriever=retriever)
    for i, pair in enumerate(zip(DOCUMENTS, QUERIES, strict=True)):
        alone = query_losses(params, batch_of(*([x] for x in pair)), retriever=retriever)
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_a_share_of_the_words_is_blank():
    corruption = Corruption(0.6, blank=9, kept=(1, 2))
    document = [1, *range(20, 30), 2]
    found = corruption.of(document, [0, 5, 7, 2])
    changed = found != document
    assert changed.sum() == 6
    assert (found[changed] == 9).all()
    assert found[0] == 1
    assert found[-1] == 2
    np.testing.assert_array_equal(found, corruption.of(document, [0, 5, 7, 2]))
    assert any((found != corruption.of(document, [0, step, 7, 2])).any() for step in range(4))


def test_draws_follow_from_seed_and_step(tiny):
    """Whichever rows of a batch are made, and whatever else is in it."""
    _, retriever, _ = tiny
    settings = dataclasses.replace(
        read_config(base.get_config()).contrastive, batch_size=4, query_likelihood_weight=1.0
    )
    ids = [[10 + i, *range(30, 40), 2] for i in range(8)]
    examples = [ContrastiveExample([40, 2], [], Passage(x, f"text {i}")) for i, x in enumerate(ids)]
    corruption = corruption_of(retriever, settings)
    given = examples, settings, 0, 3, 0, 16, range(4), corruption
    batches = ContrastiveBatches(*given)
    whole, tokens = batches.batch(1)
    part, _ = batches.batch(1, slice(1, 3))
    np.testing.assert_array_equal(part["corrupted_ids"], whole["corrupted_ids"][1:3])
    blank = whole["corrupted_ids"] != whole["positive_ids"]
    np.testing.assert_array_equal(blank.sum(axis=1), [7] * 4)  # 0.6 of 11
    assert tokens.sum() == 2 * 4 * (2 + 12)
    assert (batches.batch(3)[0]["corrupted_ids"] != whole["corrupted_ids"]).any()
    assert (
        corruption_of(retriever, dataclasses.replace(settings, query_likelihood_weight=0)) is None
    )


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_micro_batches_change_nothing_and_what_is_frozen_stays(tiny, adapted):
    _, retriever, params = tiny
    frozen, trained = (), params
    if adapted:
        lora = LoraConfig(2, 4.0, 0.0, ("_proj$",))
        retriever = dataclasses.replace(retriever, module=retriever.module.clone(lora=lora))
        frozen, trained = (params,), init_lora(jax.random.key(0), params, lora)
    batch = batch_of(DOCUMENTS * 2, [*QUERIES, [45], [46, 47]])
    config = ContrastiveConfig(
        temperature=0.1, normalize="none", query_likelihood_weight=0.5, info_nce_weight=0.5
    )

    def of(config):
        gradients = functools.partial(contrastive_gradients, retriever=retriever, config=config)
        return jax.jit(gradients)(trained, batch, frozen=frozen)

    (loss, metrics), grads = of(config)
    own = jnp.mean(query_losses(params, batch, retriever=retriever))
    np.testing.assert_allclose(metrics["query_likelihood"], own, rtol=1e-5)
    (in_parts, parts), other = of(dataclasses.replace(config, micro_batch=2))
    np.testing.assert_allclose(in_parts, loss, rtol=1e-5)
    np.testing.assert_allclose(parts["query_likelihood"], own, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    if not adapted:
        return
    settings = dataclasses.replace(
        read_config(base.get_config()).contrastive, query_likelihood_weight=1.0
    )
    before = jax.tree.map(np.array, params)
    mesh = make_mesh(1, devices=jax.devices()[:1])
    setup = contrastive_setup(mesh, retriever, params, settings, optax.sgd(0.1))
    (base_,), trained = divided(retriever, params, 0)
    start = jax.tree.map(np.array, trained)
    state = setup.create(trained)
    state, _ = setup.step(state, *jax.device_put((base_,), setup.frozen), batch, None)
    pairs = zip(*map(jax.tree.leaves, (start, state.params)), strict=True)
    assert any((a != b).any() for a, b in pairs)
    for a, b in zip(*map(jax.tree.leaves, (before, base_)), strict=True):
        np.testing.assert_array_equal(a, b)


def llama_config(directory, **settings):
    settings = {"negatives": 0, "kl_weight": 0.0, "plain_share": 0.0, **settings}
    config = config_of(directory, **settings)
    config.data.dev = ""
    config.retriever.update({"source": TINY_LLAMA, "pooling": "last", "normalize": True})
    config.retriever.update({"end_token": True, "max_length": 32})
    return config


@pytest.mark.slow
def test_a_run_learns_it_and_its_export_has_the_end_token(tmp_path):
    write_jsonl(tmp_path / "triples.jsonl", [{"query": q, "pos": [d]} for q, d in PAIRS])
    config = llama_config(tmp_path, query_likelihood_weight=1.0, info_nce_weight=0.0, epochs=8.0)
    config.contrastive.lora.rank = 4
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    losses = [row["query_likelihood"] for row in rows if row["phase"] == "retriever"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.2
    assert [row["loss"] for row in rows if row["phase"] == "retriever"] == losses
    export = tmp_path / "run" / "export" / "retriever"
    retriever, params = load_retriever(str(export))
    ids = retriever.token_ids([PAIRS[0][0]], "query")
    assert ids[0][-1] == retriever.tokenizer.eos_token_id
    found = jax.jit(retriever.embed)(params, np.array(ids), np.ones((1, len(ids[0])), int))
    peer = SentenceTransformer(str(export), device="cpu")
    np.testing.assert_allclose(found, peer.encode_query([PAIRS[0][0]]), atol=2e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"retriever.source": TINY, "retriever.end_token": False, "retriever.pooling": "mean"},
         r"weight is above 0, which is for causal decoders with retriever\.pooling 'last'"),
        ({"retriever.pooling": "mean"}, r"this retriever is a Decoder with 'mean'"),
        ({"retriever.bidirectional": True}, "which is for causal decoders"),
        ({"retriever.end_token": False}, r"no token ends a text, .* set retriever\.end_token"),
        ({"retriever.source": TINY}, r"retriever\.end_token is set, but no eos token is named"),
        ({"contrastive.query_likelihood_corruption": 1.5}, "corruption is 1.5; expected a finite"),
        ({"contrastive.query_likelihood_weight": -1.0}, "weight is -1.0; expected a finite number"),
        ({"retriever.pooling": "splade"}, r"normalize and end_token, weights but float32"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    write_jsonl(tmp_path / "triples.jsonl", [{"query": q, "pos": [d]} for q, d in PAIRS])
    config = llama_config(tmp_path, query_likelihood_weight=1.0)
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_plan_has_its_work():
    def flops(weight):
        config = smoke.get_config()
        config.retriever.update({"source": TINY_LLAMA, "shape": "", "pooling": "last"})
        config.contrastive.query_likelihood_weight = weight
        shapes = RetrieverShapes(read_config(config), machine())
        planned = shapes.contrastive()
        planned.program.lower(*planned.arguments)
        return planned.model_flops

    assert flops(1.0) > flops(0.0)
