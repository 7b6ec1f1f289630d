"""Decoders with weights in 8 or 4 bits: what is loaded, where it lies, and what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from qwix._src.core import qarray
from scipy import stats

from configs import smoke
from eval import tiny_models
from expandr_jax.config import read_config
from expandr_jax.errors import UserError
from expandr_jax.loading import load_models
from expandr_jax.models import quantized
from expandr_jax.models.decoder import cast_weights, token_positions, unstack_layers
from expandr_jax.models.lora import LoraConfig, init_lora, merge_lora
from expandr_jax.models.mask import causal_mask
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.sharding import make_mesh
from expandr_jax.training.flops import forward_flops
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


def dequantized(params, form):
    """The same weights in float32, unpacked by numpy: number or level, times scale."""
    flat = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(params).items()}
    for path in [path for path in flat if path[-1] == "kernel_scale"]:
        kernel, scale = (*path[:-1], "kernel"), flat.pop(path)
        if flat[kernel].dtype == np.int8:
            flat[kernel] = flat[kernel].astype(np.float32) * scale[..., None, :]
        else:
            flat[kernel] = unpacked(flat[kernel], scale, LEVELS[form])
    return traverse_util.unflatten_dict(flat)


LEVELS = {"nf4": quantized.NF4, "int4": np.arange(16) - 8}


def unpacked(kept, scale, levels):
    """[..., in, out] of bytes, number by number."""
    *stack, rows, outputs = kept.shape
    block = 2 * rows // scale.shape[-2]
    result = np.empty((*stack, 2 * rows, outputs), np.float32)
    for row in range(2 * rows):
        of, place = divmod(row, block)
        byte = kept[..., of * block // 2 + place % (block // 2), :]
        code = byte >> 4 if place >= block // 2 else byte & 15
        result[..., row, :] = levels[code] * scale[..., of, :]
    return result


def weights(inputs, outputs, seed=0):
    return np.random.default_rng(seed).normal(size=(inputs, outputs)).astype(np.float32) / 50


def test_nf4s_levels_are_quantiles_of_a_normal_distribution():
    """As QLoRA's equation and its released code have them: 8 above 0, 7 below, and 0."""
    ends = 0.9677083
    above = stats.norm.ppf(np.linspace(ends, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(ends, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([above, [0], below])) / above[0]
    np.testing.assert_allclose(quantized.NF4, levels, atol=1e-7)


@pytest.mark.parametrize(("form", "qtype"), [("nf4", "nf4"), ("int4", jnp.int4)])
@pytest.mark.parametrize(("inputs", "block"), [(256, 64), (96, 32), (10, 2)])
def test_four_bits_are_qwixs(form, qtype, inputs, block):
    x = weights(inputs, 24)
    x[:block, 3] = 0  # A block of nothing.
    greatest = np.abs(x).reshape(-1, block, 24).max(axis=1).repeat(block, axis=0)
    kept, scale = quantized.quantize(form, x)
    assert kept.dtype == np.uint8
    assert (kept.shape, scale.shape) == quantized.kept_shapes(form, inputs, 24)
    assert scale.shape[0] == inputs // block
    found = quantized.dequantize(form, jnp.asarray(kept), jnp.asarray(scale))
    how = qarray.HowToQuantize(qtype=qtype, channelwise_axes=(1,), tiled_axes={0: block})
    peer = qarray.quantize(jnp.asarray(x), how)
    same = np.isclose(found, qarray.dequantize(peer), rtol=1e-5, atol=0)
    if form == "nf4":
        assert same.all()
        np.testing.assert_array_equal(found, unpacked(kept, scale, LEVELS[form]))
    else:
        # A block's greatest is half a step from two numbers.
        assert (same | (np.abs(x) == greatest)).all()
        np.testing.assert_array_equal(found, unpacked(kept, scale, LEVELS[form]))
    step = np.diff(quantized.NF4).max() if form == "nf4" else 1 / 7.5
    assert (np.abs(found - x) <= 0.5001 * step * greatest).all()
    assert (np.asarray(found)[:block, 3] == 0).all()


@pytest.mark.parametrize("form", quantized.QUANTIZED_TYPES)
def test_only_the_bits_are_kept_for_the_backward_pass(form):
    x, (kept, scale) = jnp.ones((4, 64)), quantized.quantize(form, weights(64, 8))
    _, pull_back = jax.vjp(lambda x: quantized.quantized_product(form, x, kept, scale), x)
    held = {leaf.dtype.name: leaf.size for leaf in jax.tree.leaves(pull_back) if leaf.size > 8}
    assert held == {"int8": 512} if form == "int8" else {"uint8": 256}


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


@pytest.mark.parametrize(
    ("form", "unroll"),
    [
        ("int8", False),
        ("int8", True),
        ("nf4", False),
        pytest.param("int4", True, marks=pytest.mark.slow),
    ],
)
def test_it_computes_what_the_rounded_weights_do_adapter_and_gradients_included(
    source, form, unroll
):
    module, params, _ = load_model(source, dtype=form)
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
    plain = module.clone(config=dataclasses.replace(module.config, quantized=""))
    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    found, expected = step(adapter, module, params), step(adapter, plain, dequantized(params, form))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), found, expected
    )


@pytest.mark.parametrize(
    ("form", "piece_bytes"), [("int8", 999), ("int8", 64 * 2**20), ("nf4", 999)]
)
def test_pieces_and_meshes_change_nothing(source, form, piece_bytes, monkeypatch):
    _, whole, _ = load_model(source, dtype=form)
    monkeypatch.setattr(load, "PIECE_BYTES", piece_bytes)
    for mesh in (None, make_mesh(2, 2, 2)):
        _, params, _ = load_model(source, dtype=form, mesh=mesh)
        jax.tree.map(np.testing.assert_array_equal, whole, params)
    layer = params["layers"]["mlp"]["up_proj"]
    kernel, scale = (
        layer[name].addressable_shards[0].data.shape[1:] for name in ("kernel", "kernel_scale")
    )
    # A half of the inputs or of their bytes; a block of them stays whole.
    assert (kernel, scale) == (((16, 24), (24,)) if form == "int8" else ((8, 24), (1, 24)))


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_the_rest_takes_the_compute_type(source, form):
    module, params, _ = load_model(source, dtype=form, compute_dtype=jnp.bfloat16)
    assert params["embedding"].dtype == jnp.bfloat16
    assert params["final_norm"]["scale"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, params, cast_weights(params, jnp.bfloat16))
    ids, mask = map(jnp.asarray, tiny_models.ragged_batch("right"))
    inputs = ids, token_positions(mask), causal_mask(mask)
    assert jax.eval_shape(module.apply, {"params": params}, *inputs).dtype == jnp.bfloat16


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_what_few_bits_cannot_do_is_refused(source, tmp_path, form):
    generator, params = load_generator(source, dtype=form)
    adapter = init_lora(jax.random.key(0), params, LoraConfig())
    with pytest.raises(UserError, match=r"cannot be merged into weights in 8 or 4 bits"):
        merge_lora(params, adapter, LoraConfig())
    with pytest.raises(UserError, match=f"{form} are not exported: load the model in float32"):
        export_generator(tmp_path / "out", generator, params)
    assert not (tmp_path / "out").exists()
    tiny_models.save(tmp_path / "bert", "bert")
    with pytest.raises(UserError, match=f"weights in {form} are for decoders only"):
        load_model(str(tmp_path / "bert"), dtype=form)


@pytest.mark.parametrize(("weights", "kept"), [("", "float32"), ("int8", "int8"), ("nf4", "uint8")])
def test_the_config_says_what_a_run_keeps(weights, kept):
    config = smoke.get_config()
    config.generator.compute_dtype = "float32"
    config.generator.weights = weights
    params = load_models(read_config(config), lambda _: None).generator_params
    assert params["layers"]["mlp"]["up_proj"]["kernel"].dtype == kept
    assert params["embedding"].dtype == jnp.float32


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_a_plan_counts_what_a_run_keeps(form):
    config = smoke.get_config()
    config.generator.weights = form
    planned = GeneratorShapes(read_config(config), None).params
    kept = load_models(read_config(config), lambda _: None).generator_params

    def check(shape, leaf):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)

    jax.tree.map(check, planned, kept)


def test_operations_and_adapters_are_those_of_whole_kernels(source):
    config = smoke.get_config()
    config.generator.compute_dtype = "float32"
    made = {}
    for form in ("float32", "nf4"):
        config.generator.weights = form
        shapes = GeneratorShapes(read_config(config), None)
        made[form] = shapes.adapter, forward_flops(shapes.module, shapes.params, 2, 8)
    assert made["float32"] == made["nf4"]


def test_four_bits_of_a_model_are_near_its_weights(source):
    whole, params = (load_model(source, dtype=dtype)[1] for dtype in (jnp.float32, "nf4"))
    whole, found = (traverse_util.flatten_dict(t) for t in (whole, dequantized(params, "nf4")))
    assert found.keys() == whole.keys()
    for path, leaf in whole.items():
        greatest = np.abs(leaf).max(axis=-2, keepdims=True) if path[-1] == "kernel" else 0
        assert (np.abs(found[path] - leaf) <= 0.153 * greatest).all(), path


def test_odd_widths_are_refused(source):
    module, _, _ = load_model(source)
    module = module.clone(config=dataclasses.replace(module.config, mlp_dim=33))
    with pytest.raises(UserError, match=r"here: weights in nf4 want even widths; .* 33"):
        quantized.kept_in(module, "nf4", "here")
