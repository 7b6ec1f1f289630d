"""TPU's splash attention, its program interpreted here, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.models import attention
from expandr_jax.models.attention import attend
from expandr_jax.models.mask import Mask, causal_mask, padding_mask
from expandr_jax.models.splash import splash_attend, suits_splash
from expandr_jax.sharding import make_mesh

LENGTH = 150


def ragged(rows=2):
    """[rows, LENGTH] of 0/1, with padding on the right and on the left in turn."""
    real = np.arange(LENGTH) < np.array([90, 131, 17, LENGTH])[:rows, None]
    real[1::2] = real[1::2, ::-1]
    return jnp.asarray(real)


def responses():
    """Rows of a prompt, two responses and padding."""
    row = np.repeat([1, 2, 3, 0], [40, 60, 30, 20])
    other = np.repeat([1, 2, 3, 0], [70, 10, 70, 0])
    return Mask(jnp.asarray(np.stack([row, other])), causal=True, responses=2)


def windowed(flag, window=20, mask=causal_mask):
    place = jnp.arange(LENGTH)[None]
    return mask(ragged()).within(window, place, place).replace(windowed=flag)


MASKS = {
    "causal": lambda: causal_mask(ragged()),
    "after a beginning": lambda: causal_mask(ragged()).after(30),
    "padding": lambda: padding_mask(ragged()),
    "sliding": lambda: windowed(None),
    "sliding, in this layer": lambda: windowed(jnp.asarray(True)),
    "sliding, in another layer": lambda: windowed(jnp.asarray(False)),
    "sliding both ways": lambda: windowed(None, mask=padding_mask),
    "sliding both ways, in this layer": lambda: windowed(jnp.asarray(True), mask=padding_mask),
    "sliding wider than the row": lambda: windowed(jnp.asarray(True), 200),
    "responses": responses,
}


def inputs(mask, heads=4, kv_heads=2, width=16):
    rng = np.random.default_rng(0)
    rows, keys = mask.segments.shape
    shapes = (rows, LENGTH, heads), (rows, keys, kv_heads), (rows, keys, kv_heads)
    return [jnp.asarray(rng.normal(size=(*shape, width)), jnp.float32) for shape in shapes]


def value_and_gradients(form, arrays, mask):
    """The outputs at real tokens, and gradients of a sum that weighs each one differently."""
    real = (mask.segments[:, -LENGTH:] > 0)[:, :, None, None]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)

    def loss(*arrays):
        out = jnp.where(real, form(*arrays, mask, 0.3), 0)
        return jnp.sum(weights * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*arrays)
    return out, *gradients


def interpreted(*args):
    return splash_attend(*args, interpret=True)


def check(arrays, mask):
    assert suits_splash(LENGTH, arrays[1].shape[1], len(arrays[0]), mask)
    expected = value_and_gradients(attend, arrays, mask)
    found = value_and_gradients(interpreted, arrays, mask)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=0)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_the_plain_ones(name, one_device):
    mask = MASKS[name]()
    check(inputs(mask), mask)


def test_one_head_of_keys_serves_all_queries(one_device):
    mask = causal_mask(ragged())
    check(inputs(mask, 3, 1), mask)


@pytest.mark.parametrize("kv_heads", [2, 1])  # One head cannot be spread over "tensor".
def test_rows_and_heads_are_spread_over_a_mesh(kv_heads):
    place = jnp.arange(LENGTH)[None]
    mask = causal_mask(ragged(4)).within(20, place, place)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        check(inputs(mask, 4, kv_heads), mask.replace(windowed=jnp.asarray(True)))


def test_what_the_kernel_cannot_do_is_left_to_the_plain_form(one_device, monkeypatch):
    mask = causal_mask(ragged())
    assert suits_splash(LENGTH, LENGTH, 2, mask)
    assert not suits_splash(1, LENGTH, 2, mask)
    assert not suits_splash(LENGTH, LENGTH, 2, Mask(array=mask.dense(LENGTH)))
    place = jnp.arange(LENGTH)[None]
    assert not suits_splash(LENGTH, LENGTH, 2, responses().within(20, place, place))
    assert suits_splash(LENGTH, LENGTH, 2, responses().within(LENGTH, place, place))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert suits_splash(LENGTH, LENGTH, 4, mask)
        assert not suits_splash(LENGTH, LENGTH, 2, mask)  # Rows do not divide.
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not suits_splash(LENGTH, LENGTH, 4, mask)


def test_attention_takes_the_kernel_on_tpus_only(one_device, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "splash_attend", lambda *args: calls.append(args) or args[0])
    mask = causal_mask(ragged())
    arrays = inputs(mask)
    attend(*arrays, mask, 0.3)
    assert not calls
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    attend(*arrays, mask, 0.3)
    assert len(calls) == 1
    attend(*arrays, mask, 0.3, dropout=lambda x: x)
    attend(*arrays, mask, 0.3, bias=jnp.zeros((4, LENGTH, LENGTH)))
    assert len(calls) == 1
