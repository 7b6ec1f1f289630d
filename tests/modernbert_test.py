"""ModernBERT against PyTorch transformers, and the promises of its local attention."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.objectives.contrastive import contrastive_gradients
from expandr_jax.sharding import batch_sharding, make_mesh, param_shardings
from expandr_jax.training.flops import forward_flops
from expandr_jax.weights.export import export_encoder
from expandr_jax.weights.families import family_of
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.load import leaf_shapes
from tests.accumulation_test import CONFIG, batch_of, close
from tests.load_model import load_model

FAMILIES = ("modernbert", "modernbert-biases")


@functools.partial(jax.jit, static_argnums=0)
def encode(module, params, ids, mask):
    return module.apply({"params": params}, ids, mask)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    reference = tiny_models.save(directory, request.param)
    return directory, reference


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_longer_than_the_window_equal_transformers_padded_or_not(tiny, side):
    directory, reference = tiny
    module, params, _ = load_model(str(directory))
    ids, mask = tiny_models.ragged_batch(side, lengths=(40, 17, 9, 1))
    found = tiny_models.unpadded(encode(module, params, ids, mask), mask)
    with torch.no_grad():
        padded = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
        alone = [
            reference(torch.tensor(row[None])).last_hidden_state[0].numpy()
            for row in tiny_models.unpadded(ids, mask)
        ]
    for ours, *theirs in zip(found, tiny_models.unpadded(padded, mask), alone, strict=True):
        for other in theirs:
            np.testing.assert_allclose(ours, other, atol=2e-4, rtol=0)


def test_a_local_layer_sees_its_window_and_no_more(tmp_path):
    """By gradient: of half of `local_attention` on either side, the last token included."""
    tiny_models.save(tmp_path, "modernbert")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layer_types": ["sliding_attention"] * 4}))
    module, params, _ = load_model(str(tmp_path))
    length, place = 40, 20
    ids = jnp.arange(length)[None] + 8
    table = params["embedding"][ids[0]]

    @jax.jit
    def gradient(table):
        def state(table):
            changed = {**params, "embedding": params["embedding"].at[ids[0]].set(table)}
            return module.apply({"params": changed}, ids, jnp.ones_like(ids))[0, place].sum()

        return jnp.abs(jax.grad(state)(table)).sum(axis=1)

    reach = 4 * (9 // 2)  # Half a window further in each of four layers.
    seen = np.flatnonzero(np.asarray(gradient(table)) > 0)
    assert (seen.min(), seen.max()) == (place - reach, place + reach)


def test_a_model_of_one_layer_has_no_norm_before_attention(tiny, tmp_path):
    options = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    config = transformers.ModernBertConfig.from_pretrained(tiny[0], **options)
    torch.manual_seed(0)
    reference = transformers.ModernBertModel(config).eval()
    reference.save_pretrained(tmp_path)
    module, params, _ = load_model(str(tmp_path))
    assert "layers" not in params
    ids = np.arange(30)[None] + 8
    with torch.no_grad():
        expected = reference(torch.tensor(ids)).last_hidden_state
    found = encode(module, params, ids, np.ones_like(ids))
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4, rtol=0)


def test_files_with_a_language_model_s_head_load_the_same(tiny, tmp_path):
    directory, reference = tiny
    _, params, _ = load_model(str(directory))
    whole = transformers.ModernBertForMaskedLM(reference.config)
    whole.model.load_state_dict(reference.state_dict())
    whole.save_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, load_model(str(tmp_path))[1])
    with pytest.raises(UserError, match=r"a modernbert model cannot generate text"):
        load_generator(str(tmp_path))


def test_a_norm_of_the_first_layer_is_unknown(tiny, tmp_path):
    directory, _ = tiny
    tensors = load_file(directory / "model.safetensors")
    assert "layers.0.attn_norm.weight" not in tensors
    extra = {"layers.0.attn_norm.weight": tensors["layers.1.attn_norm.weight"]}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"1 tensors are unknown: layers.0.attn_norm.weight"):
        load_model(str(tmp_path))


def test_half_precision_is_near_and_keeps_norms_in_float32(tiny):
    directory, _ = tiny
    whole, params, _ = load_model(str(directory))
    module, half, _ = load_model(str(directory), dtype=jnp.bfloat16, compute_dtype=jnp.bfloat16)
    assert half["layers"]["qkv_proj"]["kernel"].dtype == jnp.bfloat16
    assert half["layers"]["attention_norm"]["scale"].dtype == jnp.float32
    ids, mask = tiny_models.ragged_batch("right")
    expected = encode(whole, params, ids, mask)
    found = encode(module, half, ids, mask)
    assert found.dtype == jnp.bfloat16
    for ours, exact in zip(
        *(tiny_models.unpadded(x, mask) for x in (found, expected)), strict=True
    ):
        np.testing.assert_allclose(ours.astype(np.float32), exact, atol=0.15, rtol=0)


def test_tensors_return_bit_equal(tiny, tmp_path):
    directory, _ = tiny
    retriever, params = load_retriever(str(directory), pooling="mean", normalize=True)
    export_encoder(tmp_path / "out", retriever, params)
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name])


@pytest.mark.parametrize(
    "tiny", ["modernbert", pytest.param("modernbert-biases", marks=pytest.mark.slow)], indirect=True
)
def test_micro_batches_on_a_mesh_give_the_gradients_of_one_batch(tiny):
    directory, _ = tiny
    retriever, params = load_retriever(str(directory), pooling="cls", normalize=True, max_length=24)
    mesh = make_mesh(2, 2, 2)
    shards = param_shardings(mesh, retriever.module, *(jnp.ones((1, 1), jnp.int32),) * 2)
    kernel = shards["layers"]["qkv_proj"]["kernel"].shard_shape((3, 32, 96))
    assert kernel == (3, 16, 48)
    batch = batch_of(retriever, 0, 16)
    gradients = functools.partial(contrastive_gradients, retriever=retriever)
    (loss, _), expected = jax.jit(functools.partial(gradients, config=CONFIG))(params, batch)
    cached = functools.partial(gradients, config=dataclasses.replace(CONFIG, micro_batch=4))
    split = jax.jit(cached, in_shardings=(shards, batch_sharding(mesh)))
    (found_loss, _), found = split(jax.device_put(params, shards), batch)
    np.testing.assert_allclose(found_loss, loss, atol=1e-5)
    close(found, expected, 1e-5)
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected)) > 1e-2


def test_every_parameter_has_a_tensor(tiny):
    module, _, _ = load_model(str(tiny[0]))
    table = family_of(module).weights(module.config, False)
    assert {weight.path for weight in table} == leaf_shapes(module).keys()


def test_its_operations_are_those_counted_by_hand(tiny):
    module, params, _ = load_model(str(tiny[0]))
    length, width, inner, layers = 10, 32, 48, 4
    token = 3 * width * width + width * width + width * 2 * inner + inner * width
    expected = layers * (2 * length * token + 2 * 2 * length * length * width)
    assert forward_flops(module, params, rows=3, length=length) == 3 * expected
