"""What only an NVIDIA GPU shows: cuDNN's fused attention itself. Runs where there is one."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.commands import ROOT

pytestmark = pytest.mark.skipif(
    not pathlib.Path("/dev/nvidia0").exists(), reason="there is no NVIDIA GPU"
)

NO_USE = 77
# In a process of its own: the tests' has 8 virtual devices of the CPU.
FUSED = """
import sys
import jax, jax.numpy as jnp, numpy as np

try:
    (device, *_) = jax.devices("cuda")
except RuntimeError:
    sys.exit(77)  # A card, and a jax that cannot use it.
if float(device.compute_capability) < 8.0:
    sys.exit(77)

from expandr_jax.models import attention
from expandr_jax.models.mask import Mask, causal_mask, padding_mask

rng = np.random.default_rng(0)
calls = []
real = jax.nn.dot_product_attention


def counted(*args, **kwargs):
    calls.append(kwargs["implementation"])
    return real(*args, **kwargs)


jax.nn.dot_product_attention = counted


def run(dtype, arrays, weights, mask):
    def loss(q, k, v, *bias):
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        out = attention.attend(q, k, v, mask, 0.125, *bias)
        out = out.astype(jnp.float32) * weights  # Zero where padding asks: that has no meaning.
        return jnp.sum(out), out

    wanted = tuple(range(len(arrays)))
    (_, out), gradients = jax.jit(jax.value_and_grad(loss, wanted, has_aux=True))(*arrays)
    return out, *gradients


lengths = np.array([128, 77])
ones = jnp.asarray(np.arange(128) < lengths[:, None], jnp.int32)
packed = jnp.asarray(np.where(ones, 1 + (np.arange(128) >= 40) + (np.arange(128) >= 70), 0))
masks = {
    "padding": padding_mask(ones),
    "causal": causal_mask(ones),
    "packed": Mask(packed.astype(jnp.int32), causal=True, responses=2),
    "padding, bias": padding_mask(ones),
    "padding on the left, bias": padding_mask(ones[:, ::-1]),
}
for name, mask in masks.items():
    real = mask.segments > 0
    for heads, groups, width in ((12, 12, 32), (9, 3, 64), (32, 8, 128 - 8 * ("bias" in name))):
        q, k, v, weights = (
            jnp.asarray(rng.normal(size=(2, 128, n, width)), jnp.float32)
            for n in (heads, groups, groups, heads)
        )
        weights = weights * real[:, :, None, None]
        arrays = q, k, v
        if "bias" in name:
            arrays += (jnp.asarray(rng.normal(size=(heads, 128, 128)), jnp.float32),)
        with jax.default_matmul_precision("highest"):
            expected = run(jnp.float32, arrays, weights, mask)
        assert not calls
        found = run(jnp.bfloat16, arrays, weights, mask)
        assert calls == ["cudnn"], calls
        calls.clear()
        errors = [
            float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            for a, b in zip(found, expected, strict=True)
        ]
        print(name, heads, groups, width, *(f"{error:.1e}" for error in errors), flush=True)
        assert max(errors) < 1e-2, errors
"""


def test_the_fused_kernel_gives_what_the_plain_form_gives_in_float32():
    environment = {**os.environ, "JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", FUSED],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == NO_USE:
        pytest.skip("jax has no GPU of compute capability 8 or more")
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
