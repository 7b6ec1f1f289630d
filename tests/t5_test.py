"""T5's encoder: distances, shared tables, and the Dense layer of GTR and sentence-T5.

Hidden states are compared in bert_test.py and the way back in export_test.py, with the others.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)
from transformers.models.t5.modeling_t5 import T5Attention

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.models.t5 import relative_buckets
from expandr_jax.weights.export import export_retriever
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.export_test import embed
from tests.load_model import load_model


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 12), (64, 100)])
def test_buckets_of_all_distances_equal_transformers(buckets, farthest):
    place = torch.arange(300)
    expected = T5Attention._relative_position_bucket(
        place[None] - place[:, None], True, buckets, farthest
    )
    np.testing.assert_array_equal(relative_buckets(300, buckets, farthest), expected)


@pytest.fixture
def gtr(tmp_path):
    """Writes a directory as sentence-transformers does, of the shape of GTR."""

    def write(bias, activation, normalize):
        tiny_models.save(tmp_path / "t5", "t5-gated")
        torch.manual_seed(1)
        modules = [
            Transformer(str(tmp_path / "t5")),
            Pooling(32, "mean"),
            Dense(32, 24, bias=bias, activation_function=activation),
            *[Normalize()] * normalize,
        ]
        similarity = "cosine" if normalize else "dot"
        model = SentenceTransformer(modules=modules, similarity_fn_name=similarity, device="cpu")
        model.save(str(tmp_path / "gtr"))
        return model, tmp_path / "gtr"

    return write


TEXTS = ["abc d", "e", "many letters make a long text"]


@pytest.mark.parametrize(
    ("bias", "activation", "normalize"),
    [(False, torch.nn.Identity(), True), (True, torch.nn.Tanh(), False)],
)
def test_dense_layers_load_and_return(gtr, bias, activation, normalize, tmp_path):
    model, directory = gtr(bias, activation, normalize)
    retriever, params = load_retriever(str(directory))
    assert retriever.pooling == "mean"
    assert retriever.normalize == normalize
    expected = model.encode(TEXTS)
    assert expected.shape == (3, 24)
    np.testing.assert_allclose(embed(retriever, params, TEXTS), expected, atol=1e-5)
    export_retriever(tmp_path / "out", retriever, params)
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_array_equal(again.encode(TEXTS), expected)
    ours, same = load_retriever(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert (ours.module, ours.dense) == (retriever.module, retriever.dense)


def test_dense_layers_that_do_not_fit_are_refused(gtr):
    _, directory = gtr(False, torch.nn.Tanh(), True)
    weights, config = directory / "2_Dense/model.safetensors", directory / "2_Dense/config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "activation_function": "torch.nn.ReLU"}))
    with pytest.raises(UserError, match=r"activation_function 'torch.nn.ReLU' is not supported"):
        load_retriever(str(directory))
    for name, wrong in (("bias", True), ("in_features", 24), ("out_features", 32)):
        config.write_text(json.dumps({**settings, name: wrong}))
        with pytest.raises(UserError, match=f"2_Dense/config.json: {name} is {wrong}; expected"):
            load_retriever(str(directory))
    config.write_text(json.dumps(settings))
    save_file({"linear.weight": np.zeros((24, 31), np.float32)}, weights)
    with pytest.raises(UserError, match=r"expected linear.weight of width 32 .* \(24, 31\)"):
        load_retriever(str(directory))
    save_file({"linear.weight": np.zeros((24, 32), np.int8)}, weights)
    with pytest.raises(UserError, match=r"2_Dense/model.safetensors: .* not of a floating type"):
        load_retriever(str(directory))
    save_file({"linear.weight": np.full((24, 32), 1e300)}, weights)
    with pytest.raises(UserError, match=r"2_Dense/model.safetensors: it has NaN or infinite val"):
        load_retriever(str(directory))
    weights.unlink()
    with pytest.raises(UserError, match=r"2_Dense/model.safetensors: no such file; pytorch_model"):
        load_retriever(str(directory))
    modules = json.loads((directory / "modules.json").read_text())
    (directory / "modules.json").write_text(json.dumps(modules[:1] + modules[:0:-1]))
    with pytest.raises(UserError, match=r"modules are 'Transformer, Normalize, Dense, Pooling"):
        load_retriever(str(directory))


def test_whole_models_and_second_names_load_the_same(tmp_path):
    model = tiny_models.save(tmp_path, "t5", head=True)
    path = tmp_path / "model.safetensors"
    module, params, _ = load_model(str(tmp_path))
    ids = np.arange(9)[None] + 8
    with torch.no_grad():
        expected = model.encoder(input_ids=torch.tensor(ids)).last_hidden_state.numpy()
    found = module.apply({"params": params}, jnp.asarray(ids), jnp.ones_like(ids))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    with pytest.raises(UserError, match=r"a t5 model cannot generate text"):
        load_generator(str(tmp_path))

    tensors = load_file(path)
    copy = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    save_file(tensors | copy, path)
    jax.tree.map(np.testing.assert_array_equal, params, load_model(str(tmp_path))[1])
    save_file({k: v for k, v in tensors.items() if k != "shared.weight"} | copy, path)
    jax.tree.map(np.testing.assert_array_equal, params, load_model(str(tmp_path))[1])
    save_file(tensors | {"encoder.embed_tokens.weight": 2 * tensors["shared.weight"]}, path)
    with pytest.raises(UserError, match=r"should equal shared.weight, .* do not: encoder.embed"):
        load_model(str(tmp_path))
