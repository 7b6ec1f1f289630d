"""What is written loads in transformers, sentence-transformers and peft, and computes the same."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer

from configs import smoke
from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.models.lora import LoraConfig, init_lora, merge_lora
from expandr_jax.sharding import make_mesh
from expandr_jax.weights.adapter import base_name, export_adapter, load_adapter
from expandr_jax.weights.export import export_generator, export_retriever
from expandr_jax.weights.families import model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.source import locate
from tests import conftest
from tests.load_model import logits
from train.export import export_one


@pytest.mark.parametrize("family", tiny_models.DECODERS)
def test_generators_return_to_transformers_bit_equal(family, tmp_path):
    tiny_models.save(tmp_path / "in", family, head=True)
    generator, params = load_generator(str(tmp_path / "in"))
    export_generator(tmp_path / "out", generator, params)
    before, after = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(tensor, after[name])
    ids = tiny_models.ragged_batch("right", lengths=(12, 12))[0]
    with torch.no_grad():
        found, expected = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / d)(
                torch.tensor(ids)
            ).logits
            for d in ("out", "in")
        )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(
        logits(generator.module, params, ids, np.ones_like(ids)), found, atol=1e-5, rtol=0
    )


def test_generator_settings_and_tokenizer_return(tmp_path):
    tiny_models.save(tmp_path / "in", "llama-3.2", head=True)
    generator, params = load_generator(str(tmp_path / "in"))
    export_generator(tmp_path / "out", generator, params, dtype=jnp.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    message = [{"role": "user", "content": "a b c"}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert ids == generator.chat_ids("a b c", 99)[0]
    model.generate(**tokenizer("abc", return_tensors="pt"), max_new_tokens=2)
    again, _ = load_generator(str(tmp_path / "out"))
    assert (again.module, again.eos_ids, again.pad_id) == (generator.module, (2,), 0)


@pytest.mark.parametrize("family", ["bert", "modernbert", "roberta", "t5", "qwen2"])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("last", True)])
def test_retrievers_load_in_sentence_transformers(family, pooling, normalize, tmp_path):
    tiny_models.save(tmp_path / "in", family)
    retriever, params = load_retriever(
        str(tmp_path / "in"),
        pooling=pooling,
        normalize=normalize,
        max_length=20,
        query_prompt="query: ",
        document_prompt="passage: ",
    )
    export_retriever(tmp_path / "out", retriever, params)
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts = ["abc d", "e", "many letters make a long text"]
    for kind, encode in [("query", model.encode_query), ("document", model.encode_document)]:
        np.testing.assert_allclose(encode(texts), embed(retriever, params, texts, kind), atol=1e-5)
    assert (model.max_seq_length, model.similarity_fn_name) == (
        20,
        "cosine" if normalize else "dot",
    )
    again, same = load_retriever(str(tmp_path / "out"))
    for field in (
        "module",
        "pooling",
        "normalize",
        "max_length",
        "query_prompt",
        "document_prompt",
    ):
        assert getattr(again, field) == getattr(retriever, field), field
    jax.tree.map(np.testing.assert_array_equal, params, same)
    # And a directory that sentence-transformers itself writes is read alike.
    model.save(str(tmp_path / "theirs"))
    theirs, _ = load_retriever(str(tmp_path / "theirs"))
    for field in (
        "module",
        "pooling",
        "normalize",
        "max_length",
        "query_prompt",
        "document_prompt",
    ):
        assert getattr(theirs, field) == getattr(retriever, field), field


def test_a_model_whose_vectors_sentence_transformers_would_cut_is_refused(tmp_path):
    tiny_models.save(tmp_path / "in", "bert")
    retriever, params = load_retriever(str(tmp_path / "in"), pooling="mean", normalize=True)
    export_retriever(tmp_path / "out", retriever, params)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu", truncate_dim=8)
    assert theirs.encode("abc").shape == (8,)
    theirs.save(str(tmp_path / "cut"))
    with pytest.raises(UserError, match=r"config_sentence_transformers.json: truncate_dim=8 is"):
        load_retriever(str(tmp_path / "cut"))


def embed(retriever, params, texts, kind=None):
    rows = retriever.token_ids(texts, kind)
    width = max(map(len, rows))
    ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    mask = (np.arange(width) < np.array([[len(row)] for row in rows])).astype(int)
    return np.asarray(jax.jit(retriever.embed)(params, ids, mask))


@pytest.mark.slow
def test_minilm_returns_bit_equal_and_embeds_as_sentence_transformers_does(minilm, tmp_path):
    retriever, params = minilm
    export_retriever(tmp_path / "out", retriever, params)
    again, same = load_retriever(str(tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert again.max_length == 256
    source = load_file(locate(conftest.MINILM) / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, source[name])
    text = "how do I pad an array with zeros on one side of the last axis in numpy"
    texts = [f"{text[i % 7 : i % 71 + 9]} {i}" for i in range(200)]
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.tokenizer(texts)["input_ids"] == retriever.token_ids(texts)
    np.testing.assert_allclose(model.encode(texts), embed(retriever, params, texts), atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_adapters_load_in_peft_on_the_base_they_name(family, tmp_path, monkeypatch):
    tiny_models.save(tmp_path / "in", family, head=True)
    generator, params = load_generator(str(tmp_path / "in"))
    lora = LoraConfig(rank=4, alpha=6.0, dropout=0.1, targets=("q_proj$", "v_proj$", "down_proj$"))
    adapter = init_lora(jax.random.key(0), params, lora)
    adapter = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), adapter
    )
    export_adapter(
        tmp_path / "out", adapter, lora, generator.module.config, base=str(tmp_path / "in")
    )
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny_models.ragged_batch("right", lengths=(12, 12))[0]
    with torch.no_grad():
        expected = model(torch.tensor(ids)).logits.numpy()
    merged = logits(generator.module, merge_lora(params, adapter, lora), ids, np.ones_like(ids))
    np.testing.assert_allclose(merged, expected, atol=1e-5, rtol=0)

    settings, again = load_adapter(str(tmp_path / "out"), generator.module.config)
    jax.tree.map(np.testing.assert_array_equal, adapter, again)
    assert (settings.rank, settings.alpha, settings.dropout) == (4, 6.0, 0.1)
    assert init_lora(jax.random.key(0), params, settings).keys() == adapter.keys()
    # An adapter's directory is a model too: its base with the adapter merged.
    for mesh in (None, make_mesh(2, 2, 2)):
        _, same = load_generator(str(tmp_path / "out"), mesh=mesh)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            merge_lora(params, adapter, lora),
            same,
        )
    config = ml_collections.ConfigDict({"generator": {"source": str(tmp_path / "out")}})
    assert base_name(tmp_path, config.generator.source) == str(tmp_path / "export" / "base")
    config.generator.source = str(tmp_path / "in")
    assert base_name(tmp_path, config.generator.source) == str(tmp_path / "in")
    # A path that begins where the program ran is written as one that is right everywhere.
    monkeypatch.chdir(tmp_path)
    config.generator.source = "in"
    assert base_name(tmp_path, config.generator.source) == str(tmp_path / "in")
    config.generator.source = "in/../out"
    assert base_name(pathlib.Path("run"), config.generator.source) == str(
        tmp_path / "run" / "export" / "base"
    )
    # And one that peft itself writes.
    model.save_pretrained(tmp_path / "theirs")
    _, theirs = load_adapter(str(tmp_path / "theirs"), generator.module.config)
    jax.tree.map(np.testing.assert_array_equal, adapter, theirs)

    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(UserError, match=r"use_dora=True is not supported"):
        load_adapter(str(tmp_path / "out"), generator.module.config)


def test_an_adapter_of_llama_3_8b_has_the_names_and_shapes_that_peft_gives_it(tmp_path):
    """As ExpandR's published adapter: r 8 on q and v; the base itself is never made."""
    shape = {
        "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
        "max_position_embeddings": 8192, "rope_theta": 5e5,
    }  # fmt: skip
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    settings = peft.LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )
    state = peft.get_peft_model_state_dict(peft.get_peft_model(base, settings))
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in state.items()}
    published = tmp_path / "published"
    settings.save_pretrained(published)
    save_file(arrays, published / "adapter_model.safetensors")
    config = model_config(Fields(shape, "config.json"), "llama")
    lora, adapter = load_adapter(str(published), config)
    assert (lora.rank, lora.alpha, lora.dropout) == (8, 32, 0.1)
    weights = adapter["layers"]["self_attn"]["v_proj"]
    assert (weights["a"].shape, weights["b"].shape) == ((32, 4096, 8), (32, 8, 1024))
    export_adapter(tmp_path / "out", adapter, lora, config, base="meta-llama/base")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(written[name], array)


@pytest.fixture
def run(tmp_path):
    """What a finished run of a bfloat16 generator and a bfloat16 retriever leaves behind."""
    work = tmp_path / "run"
    sources = {"generator": ("qwen2", True), "retriever": ("bert", False)}
    for name, (family, head) in sources.items():
        model = tiny_models.save(tmp_path / name, family, head=head)
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
    generator, params = load_generator(str(tmp_path / "generator"))
    export_generator(work / "export" / "generator", generator, params)
    retriever, params = load_retriever(
        str(tmp_path / "retriever"), pooling="mean", normalize=True, max_length=20
    )
    export_retriever(work / "export" / "retriever", retriever, params)
    config = json.loads(smoke.get_config().to_json())
    for name in sources:
        config[name] |= {"source": str(tmp_path / name), "sha256": None}
    (work / "config.json").write_text(json.dumps({"config": config}))
    return work


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "source"])
@pytest.mark.parametrize("kind", ["base", "generator", "retriever", "encoder"])
def test_a_runs_models_are_written_in_any_type(run, kind, dtype, tmp_path):
    export_one(run, tmp_path / "out", kind, dtype)
    expected = "float32" if dtype == "float32" else "bfloat16"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in written.values()} == {expected}
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if kind in ("base", "generator"):
        again, _ = load_generator(str(tmp_path / "out"))
        assert again.tokenizer.chat_template == tiny_models.TEMPLATE
        before = load_file(run.parent / "generator" / "model.safetensors")
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert str(model.dtype) == f"torch.{expected}"
    else:
        before = load_file(run.parent / "retriever" / "model.safetensors")
        assert (tmp_path / "out" / "modules.json").exists() == (kind == "retriever")
        assert transformers.AutoModel.from_pretrained(tmp_path / "out").dtype is not None
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor.astype(np.float32), before[name].astype(np.float32))


def test_a_run_that_is_not_there_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"config.json: not a run's config"):
        export_one(tmp_path / "none", tmp_path / "out", "generator", "float32")
    with pytest.raises(UserError, match=r"export/adapter: not there; let train.joint finish"):
        export_one(run, tmp_path / "out", "adapter", "float32")
    (run / "export" / "retriever").rename(run / "elsewhere")
    change_config(run, "data", kind="triples")
    with pytest.raises(UserError, match=r"retriever: not there; let train.retriever or train.j"):
        export_one(run, tmp_path / "out", "encoder", "float32")
    change_config(run, "generator", source="")  # As configs/retriever.py has it.
    for kind in ("base", "generator", "adapter"):
        message = rf"run: this run has no generator, so no {kind} can be written"
        with pytest.raises(UserError, match=message):
            export_one(run, tmp_path / "out", kind, "float32")


def change_config(run, section, **values):
    config = json.loads((run / "config.json").read_text())
    config["config"][section] |= values
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "text",
    ["3", "[]", "null", "{", '{"config": 3}', '{"config": {}}', '{"config": {"generator": 3}}'],
)
def test_a_config_that_is_no_run_s_is_refused(run, tmp_path, text):
    (run / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config.json: not a run's config"):
        export_one(run, tmp_path / "out", "base", "float32")


@pytest.mark.parametrize(
    "change", [("data", "kind", ["a"]), ("generator", "source", 3), ("generator", "sha256", 3)]
)
def test_a_config_s_field_of_another_type_is_refused(run, tmp_path, change):
    section, name, value = change
    change_config(run, section, **{name: value})
    with pytest.raises(UserError, match=r"config.json: not a run's config"):
        export_one(run, tmp_path / "out", "base", "float32")


def test_why_another_version_s_config_is_refused_is_told(run, tmp_path):
    change_config(run, "expansion", strategy="unheard")
    with pytest.raises(UserError, match=r"config.json: .*: expansion.strategy is 'unheard'; expec"):
        export_one(run, tmp_path / "out", "base", "float32")
    record = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**record, "format": 1_000}))
    with pytest.raises(UserError, match=r"format 1000, .* use the version that wrote it"):
        export_one(run, tmp_path / "out", "base", "float32")


def test_a_name_that_is_too_long_is_refused(run, tmp_path):
    for length in (250, 300):  # The shorter one fits, but not that of the directory made first.
        with pytest.raises(UserError, match=r"n: cannot write it: File name too long"):
            export_one(run, tmp_path / ("n" * length), "base", "float32")
    assert not list(tmp_path.glob("*nnn*"))


def test_only_a_model_is_replaced(run, tmp_path):
    files = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=r"it is there and holds no model, so it is kept"):
        export_one(run, run, "generator", "float32")
    with pytest.raises(UserError, match=r"it is there and holds no model, so it is kept"):
        export_one(run, run.parent, "generator", "float32")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes.txt: it is there and holds no model"):
        export_one(run, tmp_path / "notes.txt", "generator", "float32")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(run.rglob("*")) == files
    (tmp_path / "empty").mkdir()
    for kind in ("generator", "retriever"):
        export_one(run, tmp_path / "empty", kind, "float32")
    assert (tmp_path / "empty" / "modules.json").exists()


def test_a_directory_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    tiny_models.save(tmp_path / "in", "bert")
    retriever, params = load_retriever(str(tmp_path / "in"), pooling="cls", normalize=False)
    out = tmp_path / "deep" / "out"
    export_retriever(out, retriever, params)
    first = sorted(os.listdir(out))
    (out / "old").touch()
    monkeypatch.setattr("expandr_jax.weights.export.write_settings", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_retriever(out, retriever, params)
    assert sorted(os.listdir(out)) == sorted([*first, "old"])
    monkeypatch.undo()
    export_retriever(out, retriever, params)
    assert sorted(os.listdir(out)) == first
    assert os.listdir(out.parent) == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: cannot write it"):
        export_retriever(tmp_path / "file" / "out", retriever, params)
