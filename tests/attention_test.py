"""Attention against a twin written with loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.models.attention import attend, attend_with_cache
from expandr_jax.models.mask import Mask, causal_mask, padding_mask


def twin(q, k, v, mask, scale):
    """One query, one head at a time, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, h in np.ndindex(q.shape[:3]):
        allowed = np.flatnonzero(np.broadcast_to(mask[b], (q.shape[1], k.shape[1]))[t])
        scores = k[b, allowed, h // group] @ q[b, t, h] * scale
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, allowed, h // group]
    return out


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_grouped_heads_and_masks_equal_the_twin(kv_heads):
    q, k, v = random(0, 2, 5, 6, 4), random(1, 2, 7, kv_heads, 4), random(2, 2, 7, kv_heads, 4)
    for rows in (5, 1):
        mask = random(3, 2, rows, 7) > 0
        mask[..., 0] = True
        found = attend(*map(jnp.asarray, (q, k, v)), Mask(array=jnp.asarray(mask)), scale=0.7)
        np.testing.assert_allclose(found, twin(q, k, v, mask, 0.7), atol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_new_token_is_written_and_attended_to(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    places = np.array([4, 2])
    q, k, v = random(0, 2, 1, 4, 8), random(1, 2, 6, 2, 8), random(2, 2, 6, 2, 8)
    new_k, new_v = (np.stack([x[[0], 4], x[[1], 2]]) for x in (k, v))
    old_k, old_v = k.copy(), v.copy()
    for row, place in enumerate(places):
        old_k[row, place:], old_v[row, place:] = 7.0, 7.0
    mask = np.arange(6) <= places[:, None, None]
    found, keys, values = attend_with_cache(
        *map(jnp.asarray, (q, new_k, new_v)),
        jnp.asarray(old_k.transpose(0, 2, 3, 1)),
        jnp.asarray(old_v.transpose(0, 2, 1, 3)),
        jnp.asarray(places),
        jnp.asarray(mask),
        scale=0.5,
    )
    np.testing.assert_allclose(found, twin(q, k, v, mask, 0.5), atol=1e-5)
    filled = np.arange(6) <= places[:, None]
    np.testing.assert_allclose(np.asarray(keys).transpose(0, 3, 1, 2)[filled], k[filled], atol=1e-6)
    np.testing.assert_allclose(np.asarray(values).swapaxes(1, 2)[filled], v[filled], atol=1e-6)
    assert (np.asarray(values).swapaxes(1, 2)[~filled] == 7).all()


def test_large_scores_and_rows_that_see_nothing_stay_finite():
    q, k = 1e4 * jnp.ones((1, 2, 1, 4)), 1e4 * jnp.ones((1, 3, 1, 4))
    mask = jnp.asarray([[[True, True, False], [False, False, False]]])
    v = jnp.arange(12.0).reshape(1, 3, 1, 4)
    found = np.asarray(attend(q, k, v, Mask(array=mask), scale=1.0))
    np.testing.assert_allclose(found[0, 0, 0], [2, 3, 4, 5])
    assert np.isfinite(found).all()


def test_half_precision_keeps_its_type_and_sums_in_float32():
    q, k, v = random(0, 1, 4, 2, 8), random(1, 1, 600, 2, 8), random(2, 1, 600, 2, 8)
    mask = np.ones((1, 1, 600), bool)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    found = attend(*half, Mask(array=jnp.asarray(mask)), scale=0.01)
    assert found.dtype == jnp.bfloat16
    expected = twin(*(np.asarray(x, np.float64) for x in half), mask, 0.01)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2e-3)


def test_a_bias_is_added_to_the_scores_of_each_head():
    q, k, v = random(0, 2, 5, 6, 4), random(1, 2, 7, 3, 4), random(2, 2, 7, 3, 4)
    bias, mask = random(4, 6, 5, 7), Mask(array=jnp.ones((2, 1, 7), bool))
    found = attend(*map(jnp.asarray, (q, k, v)), mask, scale=0.7, bias=jnp.asarray(bias))
    scores = 0.7 * np.einsum("bthd,bshd->bhts", q, k.repeat(2, axis=2)) + bias
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, v.repeat(2, axis=2))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@dataclasses.dataclass
class Gpu:
    """A device as far as the choice of a kernel looks at it."""

    device_kind: str = "NVIDIA H100 80GB HBM3"
    compute_capability: str = "9.0"


@pytest.fixture
def on_gpu(monkeypatch):
    """Pretends to be on a GPU; cuDNN's calls go to XLA, which takes the same arguments."""
    calls = []
    real = jax.nn.dot_product_attention

    def fused(*args, implementation, **kwargs):
        calls.append(implementation)
        return real(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    return calls


@pytest.mark.parametrize("rows", [6, 1])
def test_the_fused_kernel_is_asked_for_the_same(on_gpu, rows, monkeypatch):
    q, k, v = (
        jnp.asarray(random(i, 2, 6, heads, 8), jnp.bfloat16) for i, heads in enumerate((4, 2, 2))
    )
    mask = random(3, 2, rows, 6) > 0
    mask[..., 0] = True
    fused = attend(q, k, v, Mask(array=jnp.asarray(mask)), scale=0.3)
    assert on_gpu == ["cudnn"]
    expected = twin(*(np.asarray(x, np.float64) for x in (q, k, v)), mask, 0.3)
    np.testing.assert_allclose(fused.astype(jnp.float32), expected, atol=3e-2)


def test_a_gpus_program_has_the_fused_kernel_forward_and_backward(monkeypatch):
    """Made here for CUDA, as far as cuDNN's own calls; only their version is made up."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91000)

    def loss(q, k, v, attention_mask):
        out = attend(q, k, v, causal_mask(attention_mask), scale=0.3)
        return jnp.sum(out.astype(jnp.float32))

    shapes = [jax.ShapeDtypeStruct((2, 6, heads, 8), jnp.bfloat16) for heads in (4, 2, 2)]
    shapes.append(jax.ShapeDtypeStruct((2, 6), jnp.int32))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shapes)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in program or "@__cudnn$fmhaScaleBiasSoftmax" in program
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in program


def biased(seed=0):
    """bfloat16 queries, keys and values, a float32 bias, and rows padded on either side."""
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.normal(size=(3, 6, 4, 8)), jnp.bfloat16) for _ in "qkv"]
    arrays.append(jnp.asarray(rng.normal(size=(4, 6, 6)), jnp.float32))
    return arrays, jnp.asarray([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1] * 6])


def biased_loss(q, k, v, bias, attention_mask):
    """A sum that weighs each output at a real token differently, and these outputs."""
    out = attend(q, k, v, padding_mask(attention_mask), scale=0.3, bias=bias)
    out = jnp.where(attention_mask[..., None, None], out.astype(jnp.float32), 0)
    return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out


def test_the_fused_kernel_takes_a_bias_and_any_padding(on_gpu, monkeypatch):
    arrays, attention_mask = biased()
    step = jax.jit(jax.value_and_grad(biased_loss, (0, 1, 2, 3), has_aux=True))
    (_, found), gradients = step(*arrays, attention_mask)
    assert on_gpu == ["cudnn"]
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    exact = [x.astype(jnp.float32) for x in arrays]
    (_, expected), plain = step(*exact, attention_mask)
    assert on_gpu == ["cudnn"]
    np.testing.assert_allclose(found, expected, atol=3e-2)
    for ours, theirs in zip(gradients, plain, strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=3e-2 * abs(theirs).max())
    # Padding has no say at all.
    assert (np.asarray(gradients[1])[0, 4:] == 0).all()
    assert np.asarray(gradients[3])[:, :, 4:].any()


def test_a_gpus_program_has_no_array_of_all_scores_where_there_is_a_bias(monkeypatch):
    """T5's relative positions: bias and its gradient are the rows' own, forward and backward."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    cudnn = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{cudnn}.check_cudnn_version", lambda: 91000)
    arrays = [jax.ShapeDtypeStruct((64, 512, 12, 64), jnp.bfloat16) for _ in "qkv"]
    arrays.append(jax.ShapeDtypeStruct((12, 512, 512), jnp.float32))
    arrays.append(jax.ShapeDtypeStruct((64, 512), jnp.int32))
    step = jax.jit(jax.grad(biased_loss, (0, 1, 2, 3), has_aux=True))
    program = step.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in program
    assert "1x12x512x512xbf16" in program
    assert "64x12x512x512" not in program


def test_a_tpus_program_with_a_bias_is_the_plain_form(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays, attention_mask = biased()
    step = jax.jit(jax.grad(biased_loss, (0, 1, 2, 3), has_aux=True))
    program = step.trace(*arrays, attention_mask).lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in program
    assert "3x4x6x6xf32" in program


def test_the_fused_kernel_is_left_alone_where_it_cannot_help(on_gpu, monkeypatch):
    def run(dtype=jnp.bfloat16, length=6, width=8, **options):
        q = k = v = jnp.ones((1, length, 2, width), dtype)
        mask = Mask(array=jnp.ones((1, 1, length), bool))
        # The choice is made while it is traced.
        jax.eval_shape(lambda *arrays: attend(*arrays, mask, scale=1.0, **options), q, k, v)
        return bool(on_gpu)

    assert not run(jnp.float32)
    assert not run(length=5)
    assert not run(width=4)
    assert not run(width=136)
    assert not run(jnp.float16, bias=jnp.zeros((2, 6, 6)))
    assert not run(width=128, bias=jnp.zeros((2, 6, 6)))
    assert not run(dropout=lambda x: x)
    assert not run(dropout=lambda x: x)
    for device in (Gpu(compute_capability="7.5"), Gpu("AMD Instinct", "gfx90a")):
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert not run()
    monkeypatch.setattr(jax, "devices", lambda: [Gpu()])
    assert run()
