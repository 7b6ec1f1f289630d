"""Loading and writing by pieces: the same values wherever they are cut, and flat memory."""

import json
import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file

from eval import tiny_models
from expandr_jax.sharding import make_mesh, param_shardings
from expandr_jax.weights import export, load, store
from expandr_jax.weights.export import export_generator, export_retriever
from expandr_jax.weights.families import example_inputs
from expandr_jax.weights.files import open_directory
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.load_model import load_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    tiny_models.save(directory, "llama", head=True)
    return str(directory)


@pytest.mark.parametrize("piece_bytes", [1, 999, 5000])
def test_leaves_filled_by_pieces_equal_whole_ones(llama, piece_bytes, monkeypatch):
    _, whole, _ = load_model(llama)
    monkeypatch.setattr(load, "PIECE_BYTES", piece_bytes)
    _, params, _ = load_model(llama)
    jax.tree.map(np.testing.assert_array_equal, whole, params)


@pytest.mark.parametrize("piece_bytes", [999, 64 * 2**20])
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_parameters_arrive_on_their_devices(llama, shape, piece_bytes, monkeypatch):
    _, whole, _ = load_model(llama)
    monkeypatch.setattr(load, "PIECE_BYTES", piece_bytes)
    mesh = make_mesh(*shape)
    module, params, _ = load_model(llama, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, params)
    shardings = param_shardings(mesh, module, *example_inputs(module))
    jax.tree.map(lambda leaf, sharding: leaf.sharding.shard_shape(leaf.shape), params, shardings)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        expected = shardings
        for key in path:
            expected = expected[key.key]
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), path
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (3, 32 // shape[1], 48 // shape[2])


@pytest.mark.parametrize("family", ["bert", "modernbert", "t5", "t5-gated"])
def test_encoders_arrive_on_their_devices(family, tmp_path):
    tiny_models.save(tmp_path, family)
    _, whole = load_retriever(str(tmp_path), pooling="mean", normalize=True)
    _, params = load_retriever(
        str(tmp_path), pooling="mean", normalize=True, mesh=make_mesh(2, 2, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def test_a_large_model_is_written_as_shards(llama, tmp_path, monkeypatch):
    generator, params = load_generator(llama)
    monkeypatch.setattr(store, "_PART_BYTES", 700)
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 20_000)
    export_generator(tmp_path / "out", generator, params)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "out" / name).stat().st_size < 24_000 for name in files)
    before = load_file(f"{llama}/model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), before[name])
    jax.tree.map(np.testing.assert_array_equal, params, load_model(str(tmp_path / "out"))[1])


def test_source_types_return_tensor_by_tensor(tmp_path):
    tiny_models.save(tmp_path / "in", "bert")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if "LayerNorm" not in name:
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
    # A prefix, as files with a pre-training head have it.
    save_file({f"bert.{name}": value for name, value in tensors.items()}, path)
    retriever, params = load_retriever(str(tmp_path / "in"), pooling="cls", normalize=False)
    export_retriever(tmp_path / "out", retriever, params, "source")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        assert tensor.dtype == tensors[name].dtype, name
        np.testing.assert_array_equal(tensor, tensors[name])


MEASURE = """
import json, sys
import jax
from eval.benchmarks.process import peak_memory
from expandr_jax.sharding import make_mesh
from tests.load_model import load_model
from expandr_jax.weights.families import family_of
from expandr_jax.weights.store import named_tensors, write_model_files
from pathlib import Path

mesh = None if jax.device_count() == 1 else make_mesh(1, 2, 2)
module, params, _ = load_model(sys.argv[1], mesh=mesh)
assert all(len(leaf.devices()) == jax.device_count() for leaf in jax.tree.leaves(params))
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
loaded = peak_memory()
weights = family_of(module).weights(module.config, True)
tensors = named_tensors(params, weights, "model.", lambda _, dtype: dtype)
largest = max(tensor.num_bytes for tensor in tensors.values())
write_model_files(Path(sys.argv[2]), tensors, 10**9)
print(json.dumps({"parameters": size, "largest": largest,
                  "load": loaded - size, "write": peak_memory() - size}))
"""


@pytest.mark.slow
def test_memory_stays_flat_on_four_gigabytes(tmp_path, capsys):
    config = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    }
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (32000, 2048), "lm_head": (32000, 2048), "model.norm": (2048,)}
    for i in range(16):
        layer = f"model.layers.{i}."
        for name, width in (("q", 2048), ("k", 512), ("v", 512), ("o", 2048)):
            shapes[f"{layer}self_attn.{name}_proj"] = (width, 2048)
        for name, shape in (("gate", (8192, 2048)), ("up", (8192, 2048)), ("down", (2048, 8192))):
            shapes[f"{layer}mlp.{name}_proj"] = shape
        shapes[layer + "input_layernorm"] = shapes[layer + "post_attention_layernorm"] = (2048,)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**26, np.float32)
    # Every tensor is another stretch of the same random numbers.
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        part = pool[i : i + int(np.prod(shape))].reshape(shape)
        tensors[f"{name}.weight"] = store.Tensor(part.dtype, shape, lambda part=part: [part])
    store.write_model_files(source, tensors, 10**9)
    del pool, part, tensors
    for devices in (1, 4):
        env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-c", MEASURE, str(source), str(out)]
        found = json.loads(subprocess.check_output(command, env=env, text=True))
        with capsys.disabled():
            print(f"\n{devices} devices, peak resident memory beyond the parameters, GB:")
            print({key: round(value / 1e9, 3) for key, value in found.items()})
        assert found["parameters"] > 4e9
        # Writing from several devices has no such bound: layers are gathered first.
        for what in ("load", "write") if devices == 1 else ("load",):
            assert found[what] < found["largest"] + 1e9, what
    (out / "config.json").write_text(json.dumps(config))
    ours, theirs = open_directory(out), open_directory(source)
    assert ours.tensors == theirs.tensors
    for name in ours.tensors:
        whole = (name, slice(None))
        np.testing.assert_array_equal(ours.read(*whole), theirs.read(*whole))
    for path in (*source.iterdir(), *out.iterdir()):
        path.unlink()
