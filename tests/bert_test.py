"""The encoder against PyTorch transformers, and its own promises."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from eval import tiny_models
from expandr_jax.models.bert import Bert, BertConfig, Block
from expandr_jax.models.mask import padding_mask
from tests.load_model import load_model

TINY = BertConfig(
    vocab_size=50, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, max_positions=32
)


@functools.partial(jax.jit, static_argnums=0)
def encode(module, params, ids, mask):
    return module.apply({"params": params}, ids, mask)


@pytest.mark.parametrize("family", tiny_models.ENCODERS)
def test_hidden_states_equal_transformers(family, tmp_path):
    reference = tiny_models.torch_model(family)
    reference.save_pretrained(tmp_path)
    module, params, _ = load_model(str(tmp_path))
    for side in ("right", "left"):
        ids, mask = tiny_models.ragged_batch(side)
        found = tiny_models.unpadded(encode(module, params, ids, mask), mask)
        # Unpadded rows: PyTorch's BERT counts positions from the padding on when that is left.
        for ours, row in zip(found, tiny_models.unpadded(ids, mask), strict=True):
            with torch.no_grad():
                theirs = reference(input_ids=torch.tensor(row[None])).last_hidden_state[0]
            np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def tiny():
    module = Bert(TINY)
    ones = jnp.ones((1, 4), jnp.int32)
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(0), ones, ones))["params"]


def test_what_stands_in_padding_changes_nothing(tiny):
    module, params = tiny
    ids, mask = tiny_models.ragged_batch("right")
    ids = ids % TINY.vocab_size
    other = np.where(mask, ids, 3)
    first, second = (encode(module, params, jnp.asarray(x), mask) for x in (ids, other))
    for a, b in zip(
        tiny_models.unpadded(first, mask), tiny_models.unpadded(second, mask), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_remat_changes_neither_values_nor_gradients(tiny):
    module, params = tiny
    ids, mask = tiny_models.ragged_batch("right")
    ids = jnp.asarray(ids % TINY.vocab_size)

    def loss(params, module):
        rngs = {"dropout": jax.random.key(1)}
        hidden = module.apply({"params": params}, ids, mask, deterministic=False, rngs=rngs)
        return jnp.square(hidden * mask[..., None]).mean()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    plain = step(params, module)
    again = step(params, module.clone(remat="full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), plain, again)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_layers_equal_a_loop_over_blocks(tiny, remat):
    module, params = tiny
    module = module.clone(remat=remat)
    ids, mask = tiny_models.ragged_batch("right")
    ids = jnp.asarray(ids % TINY.vocab_size)
    block = Block(TINY, dtype=jnp.float32, lora=None, deterministic=True)

    def scanned(params):
        hidden = module.apply({"params": params}, ids, mask)
        return jnp.square(hidden * mask[..., None]).mean()

    def looped(params):
        first = {"params": {**params, "layers": jax.tree.map(lambda x: x[:0], params["layers"])}}
        config = dataclasses.replace(TINY, num_layers=0)
        x = Bert(config).apply(first, ids, mask)
        for i in range(TINY.num_layers):
            layer = jax.tree.map(lambda x, i=i: x[i], params["layers"])
            x, _ = block.apply({"params": layer}, x, padding_mask(jnp.asarray(mask)))
        return jnp.square(x * mask[..., None]).mean()

    plain, again = (jax.jit(jax.value_and_grad(f))(params) for f in (scanned, looped))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), plain, again)


def test_dropout_depends_on_the_key_and_needs_one(tiny):
    module, params = tiny
    ids = jnp.arange(8)[None]

    @jax.jit
    def run(key):
        rngs = {"dropout": key}
        return module.apply({"params": params}, ids, ids >= 0, deterministic=False, rngs=rngs)

    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(np.asarray(first - other)).max() > 0.1


def test_bfloat16_computes_near_float32(tiny):
    module, params = tiny
    ids, mask = jnp.arange(8)[None], jnp.ones((1, 8), jnp.int32)
    half = encode(module.clone(dtype=jnp.bfloat16), params, ids, mask)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(jnp.float32), encode(module, params, ids, mask), atol=0.1, rtol=0
    )


def test_every_parameter_has_logical_axis_names():
    ones = jnp.ones((1, 4), jnp.int32)
    shapes = jax.eval_shape(Bert(TINY).init, jax.random.key(0), ones, ones)["params"]
    specs = nn.get_partition_spec(shapes)
    assert jax.tree.structure(nn.unbox(shapes)) == jax.tree.structure(
        specs, is_leaf=lambda s: isinstance(s, jax.sharding.PartitionSpec)
    )

    def check(path, leaf, spec):
        assert len(spec) == leaf.ndim, path
        assert all(isinstance(name, str) for name in spec), path
        assert (spec[0] == "layers") == (path[0].key == "layers"), path

    jax.tree_util.tree_map_with_path(check, nn.unbox(shapes), specs)
