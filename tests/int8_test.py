"""Decoders with weights in int8: what is loaded, where it lies, and what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from configs import smoke
from eval import tiny_models
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.loading import load_models
from expandr_jax.models.decoder import cast_weights, token_positions, unstack_layers
from expandr_jax.models.lora import LoraConfig, init_lora, merge_lora
from expandr_jax.models.mask import causal_mask
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.sharding import make_mesh
from expandr_jax.weights import load
from expandr_jax.weights.export import export_generator
from expandr_jax.weights.hf import load_generator
from tests.load_model import load_model


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def source(request, tmp_path_factory):
    """A model with biases, and one with norms on q and k and its own scales."""
    directory = tmp_path_factory.mktemp(request.param)
    tiny_models.save(directory, request.param, head=True)
    return str(directory)


def dequantized(params):
    """The same weights in float32: q * scale."""
    flat = traverse_util.flatten_dict(params)
    for path in [path for path in flat if path[-1] == "kernel_scale"]:
        kernel = (*path[:-1], "kernel")
        flat[kernel] = flat[kernel].astype(jnp.float32) * flat.pop(path)[..., None, :]
    return traverse_util.unflatten_dict(flat)


def test_weights_are_rounded_to_the_nearest_of_255_steps_of_each_output(source):
    _, whole, _ = load_model(source)
    _, params, _ = load_model(source, dtype=jnp.int8)
    whole, flat = (traverse_util.flatten_dict(tree) for tree in (whole, params))
    kernels = [path for path in whole if path[-1] == "kernel"]
    assert len(kernels) == 7
    for path in kernels:
        steps = np.abs(whole[path]).max(axis=-2) / 127
        np.testing.assert_allclose(flat[*path[:-1], "kernel_scale"], steps, rtol=1e-6)
        assert flat[path].dtype == jnp.int8
        assert np.abs(flat[path]).max() == 127
        error = np.abs(flat[path] * steps[..., None, :] - whole[path])
        assert (error <= 0.5001 * steps[..., None, :]).all()
    for path in whole.keys() - set(kernels):
        np.testing.assert_array_equal(flat[path], whole[path])


@pytest.mark.parametrize("unroll", [False, True])
def test_it_computes_what_the_rounded_weights_do_adapter_and_gradients_included(source, unroll):
    module, params, _ = load_model(source, dtype=jnp.int8)
    lora = LoraConfig(rank=2, dropout=0.0)
    adapter = jax.tree.map(lambda x: x + 0.1, init_lora(jax.random.key(0), params, lora))
    ids, mask = map(jnp.asarray, tiny_models.ragged_batch("right"))

    def loss(adapter, module, params):
        variables = {"params": params, "lora": adapter}
        if unroll:
            variables = {name: unstack_layers(tree) for name, tree in variables.items()}
        hidden = module.apply(variables, ids, token_positions(mask), causal_mask(mask))
        return (jnp.square(hidden) * mask[..., None]).mean()

    module = module.clone(lora=lora, unroll=unroll)
    plain = module.clone(config=dataclasses.replace(module.config, int8=False))
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    found, expected = step(adapter, module, params), step(adapter, plain, dequantized(params))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, expected
    )


@pytest.mark.parametrize("piece_bytes", [999, 64 * 2**20])
def test_pieces_and_meshes_change_nothing(source, piece_bytes, monkeypatch):
    _, whole, _ = load_model(source, dtype=jnp.int8)
    monkeypatch.setattr(load, "PIECE_BYTES", piece_bytes)
    for mesh in (None, make_mesh(2, 2, 2)):
        _, params, _ = load_model(source, dtype=jnp.int8, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, whole, params)
    layer = params["layers"]["mlp"]["up_proj"]
    assert layer["kernel"].addressable_shards[0].data.shape[1:] == (16, 24)
    assert layer["kernel_scale"].addressable_shards[0].data.shape[1:] == (24,)


def test_the_rest_takes_the_compute_type(source):
    module, params, _ = load_model(source, dtype=jnp.int8, compute_dtype=jnp.bfloat16)
    assert params["embedding"].dtype == jnp.bfloat16
    assert params["final_norm"]["scale"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, params, cast_weights(params, jnp.bfloat16))
    ids, mask = map(jnp.asarray, tiny_models.ragged_batch("right"))
    hidden = module.apply({"params": params}, ids, token_positions(mask), causal_mask(mask))
    assert hidden.dtype == jnp.bfloat16


def test_what_int8_cannot_do_is_refused(source, tmp_path):
    generator, params = load_generator(source, dtype=jnp.int8)
    adapter = init_lora(jax.random.key(0), params, LoraConfig())
    with pytest.raises(UserError, match=r"cannot be merged into int8 weights"):
        merge_lora(params, adapter, LoraConfig())
    with pytest.raises(UserError, match=r"int8 are not exported: load the model in float32"):
        export_generator(tmp_path / "out", generator, params)
    assert not (tmp_path / "out").exists()
    tiny_models.save(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match=r"weights in int8 are for decoders only"):
        load_model(str(tmp_path / "bert"), dtype=jnp.int8)


@pytest.mark.parametrize(("weights", "kept"), [("", "float32"), ("int8", "int8")])
def test_the_config_says_what_a_run_keeps(weights, kept):
    config = smoke.get_config()
    config.generator.compute_dtype = "float32"
    config.generator.weights = weights
    params = load_models(read_config(config), lambda _: None).generator_params
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == kept
    assert params["embedding"].dtype == jnp.float32


def test_a_plan_counts_what_a_run_keeps():
    config = smoke.get_config()
    config.generator.weights = "int8"
    planned = GeneratorShapes(read_config(config), None).params
    kept = load_models(read_config(config), lambda _: None).generator_params

    def check(shape, leaf):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)

    jax.tree.map(check, planned, kept)
