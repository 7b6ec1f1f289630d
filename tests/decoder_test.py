"""The decoder against PyTorch transformers, for every stock family."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eval import tiny_models
from expandr_jax.models.decoder import KVCache, token_positions, unstack_layers
from expandr_jax.models.mask import causal_mask
from tests.load_model import load_model


@pytest.fixture(scope="module", params=tiny_models.DECODERS)
def pair(request, tmp_path_factory):
    """The same random model twice: PyTorch's, ours and our parameters."""
    directory = tmp_path_factory.mktemp(request.param)
    reference = tiny_models.torch_model(request.param, head=True)
    reference.save_pretrained(directory)
    module, params, _ = load_model(str(directory))
    return reference, module, params


@functools.partial(jax.jit, static_argnums=0)
def full_pass(module, params, ids, mask):
    """Logits of a batch, without a cache, and its keys and values."""
    hidden, kv = module.apply(
        {"params": params}, ids, token_positions(mask), causal_mask(mask), keep_kv=True
    )
    return module.apply({"params": params}, hidden, method="logits"), kv


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_transformers(pair, side):
    reference, module, params = pair
    ids, mask = tiny_models.ragged_batch(side)
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            position_ids=torch.tensor(np.maximum(mask.cumsum(1) - 1, 0)),
        ).logits.numpy()
    found, _ = full_pass(module, params, ids, mask)
    assert found.dtype == np.float32
    for ours, theirs in zip(
        tiny_models.unpadded(found, mask), tiny_models.unpadded(expected, mask), strict=True
    ):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)


def test_cached_decoding_equals_the_full_pass(pair):
    _, module, params = pair
    ids, mask = tiny_models.ragged_batch("right", lengths=(17, 17, 17))
    expected, (keys, values) = full_pass(module, params, ids, mask)
    # The cache starts with some of each row; the rest is fed token by token.
    start = jnp.asarray([8, 2, 0])
    fresh = jnp.arange(ids.shape[1])[:, None] >= start[:, None, None, None]
    keys, values = (jnp.where(fresh, 7.0, x) for x in (keys, values))
    cache = KVCache(tuple(keys.swapaxes(3, 4)), tuple(values), start)
    module, params = module.clone(unroll=True), unstack_layers(params)

    @jax.jit
    def step(params, cache, token):
        hidden, cache = module.apply({"params": params}, token, cache, method="decode")
        return module.apply({"params": params}, hidden, method="logits"), cache

    rows = np.arange(len(ids))
    for _ in range(9):
        place = np.asarray(cache.length)
        logits, cache = step(params, cache, jnp.asarray(ids[rows, place]))
        np.testing.assert_allclose(logits, expected[rows, place], atol=1e-4, rtol=0)


def test_unrolled_layers_compute_the_same(pair):
    _, module, params = pair
    ids, mask = tiny_models.ragged_batch("right")
    expected, (keys, _) = full_pass(module, params, ids, mask)
    found, (unrolled_keys, _) = full_pass(
        module.clone(unroll=True), unstack_layers(params), ids, mask
    )
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(jnp.stack(unrolled_keys), keys, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """The family with the most options on."""
    directory = tmp_path_factory.mktemp("gemma")
    tiny_models.torch_model("gemma3", head=True).save_pretrained(directory)
    return load_model(str(directory))[:2]


def test_no_token_sees_a_later_one(gemma):
    module, params = gemma
    ids, mask = map(jnp.asarray, tiny_models.ragged_batch("right", lengths=(8,)))

    def output(shift, place):
        """Moves every embedding by its row of `shift`, through the table of one-hot ids."""
        table = params["embedding"][ids[0]] + shift
        moved = {**params, "embedding": params["embedding"].at[: len(table)].set(table)}
        tokens = jnp.arange(ids.shape[1])[None]
        hidden = module.apply({"params": moved}, tokens, token_positions(mask), causal_mask(mask))
        return hidden[0, place].sum()

    gradient = jax.jit(jax.grad(output))
    for place in (0, 3, 7):
        grad = gradient(jnp.zeros((ids.shape[1], module.config.hidden_size)), place)
        reached = np.abs(np.asarray(grad)).max(axis=1) > 0
        np.testing.assert_array_equal(reached, np.arange(ids.shape[1]) <= place)


def test_remat_changes_neither_values_nor_gradients(gemma):
    module, params = gemma
    ids, mask = map(jnp.asarray, tiny_models.ragged_batch("right"))

    def loss(params, module):
        hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
        return (jnp.square(hidden) * mask[..., None]).mean()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = step(params, module)
    again = step(params, module.clone(remat="dots"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), plain, again)


def test_scanned_layers_have_the_gradients_of_unrolled_ones(gemma):
    module, params = gemma
    ids, mask = map(jnp.asarray, tiny_models.ragged_batch("right"))

    def loss(params, module):
        hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
        return (jnp.square(hidden) * mask[..., None]).mean()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = step(params, module)
    again, unrolled = step(unstack_layers(params), module.clone(unroll=True))
    np.testing.assert_allclose(value, again, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        unstack_layers(gradient),
        unrolled,
    )


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_padding_changes_nothing(gemma, side):
    module, params = gemma
    ids, mask = tiny_models.ragged_batch(side)
    first, second = (full_pass(module, params, x, mask)[0] for x in (ids, np.where(mask, ids, 3)))
    for a, b in zip(
        tiny_models.unpadded(first, mask), tiny_models.unpadded(second, mask), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_a_shared_beginning_given_as_keys_and_values_changes_nothing(gemma):
    """The window of local layers reaches back over it."""
    module, params = gemma
    module, variables = module.clone(unroll=True), {"params": unstack_layers(params)}
    ids, mask = tiny_models.ragged_batch("right", (14, 9, 7))
    ids[:, :6] = ids[0, :6]
    start, rest = mask[:1, :6], mask[:, 6:]

    @jax.jit
    def run(variables, ids, mask):
        return module.apply(variables, ids, token_positions(mask), causal_mask(mask), keep_kv=True)

    @jax.jit
    def behind(variables, past):
        attention = causal_mask(jnp.asarray(rest)).after(6)
        places = 6 + token_positions(jnp.asarray(rest))
        return module.apply(variables, ids[:, 6:], places, attention, past=past)

    whole, _ = run(variables, ids, mask)
    found = behind(variables, run(variables, ids[:1, :6], start)[1])
    for a, b in zip(
        tiny_models.unpadded(np.asarray(found), rest),
        tiny_models.unpadded(np.asarray(whole[:, 6:]), rest),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)
