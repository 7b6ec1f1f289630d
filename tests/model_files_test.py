"""Spoilt files of a model: one line that names the file and what is wrong, never a traceback."""

import json
import os
import random
import shutil
import struct
from pathlib import Path

import jax
import numpy as np
import pytest

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.models.lora import LoraConfig, init_lora
from expandr_jax.weights.adapter import export_adapter
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.safetensors_file import write_plain_safetensors
from tests.beir_test import mutate
from tests.gguf_test import write_gguf
from tests.load_model import load_model
from tests.mutations_test import check_complaint, complaint_of

DATA = Path(__file__).parent.parent / "configs" / "tiny"
WEIGHTS, SHARD = "model.safetensors", "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"


def text(value):
    """Replaces a file, or writes one."""
    content = value if isinstance(value, bytes) else value.encode()
    return lambda path: path.write_bytes(content)


def fields(**changes):
    """Changes fields of a JSON object; makes one where there is none."""

    def change(path):
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **changes}))

    return change


def cut(size):
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def entry(**changes):
    """Changes the first tensor's entry in the header of a safetensors file."""

    def change(path):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        name = min(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])
        header[name] |= changes
        new = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return change


def shards(change):
    """Makes the weights a shard; `change` is given the map of the index."""

    def spoil(path):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        names = json.loads(data[8 : 8 + length]).keys() - {"__metadata__"}
        path.rename(path.with_name(SHARD))
        places = change(dict.fromkeys(sorted(names), SHARD))
        path.with_name(INDEX).write_text(json.dumps({"weight_map": places}))

    return spoil


def modules(number, **changes):
    """Changes one entry of modules.json."""

    def change(path):
        entries = json.loads(path.read_text())
        entries[number] |= changes
        path.write_text(json.dumps(entries))

    return change


def template(value):
    """Puts a chat template into tokenizer_config.json instead of its own file."""

    def change(path):
        path.with_name("chat_template.jinja").unlink()
        fields(chat_template=value)(path)

    return change


# Model, file, what is done to it, and the complaint; the file is named in it where it has no more.
SPOILT = [
    *(
        (model, name, text(content), message)
        for model, names in {
            "bert": (
                "config.json", "tokenizer_config.json", "special_tokens_map.json",
                "1_Pooling/config.json", "sentence_bert_config.json",
                "config_sentence_transformers.json",
            ),
            "llama": ("config.json", "generation_config.json", "tokenizer_config.json"),
        }.items()
        for name in names
        for content, message in (
            ("{", f"{name}: not readable JSON"),
            ("[" * 100_000, f"{name}: not readable JSON"),
            (b'{"a": "\xff"}', f"{name}: not UTF-8"),
            ("[1]", f"{name}: it is [1]; expected a JSON object"),
            ("null", f"{name}: it is None; expected a JSON object"),
        )
    ),
    ("bert", WEIGHTS, cut(0), "header too small"),
    ("bert", WEIGHTS, cut(100), "invalid header length"),
    ("bert", WEIGHTS, cut(-10), "file not fully covered"),
    ("bert", WEIGHTS, lambda p: p.write_bytes(p.read_bytes() + b"more"), "file not fully covered"),
    ("bert", WEIGHTS, text(b"\xff" * 1000), "header too large"),
    ("bert", WEIGHTS, text(struct.pack("<Q", 3) + b"[1]"), "invalid JSON in header"),
    ("bert", WEIGHTS, text(struct.pack("<Q", 10**5) + b"[" * 10**5), "not a readable safetensors"),
    ("bert", WEIGHTS, entry(dtype="C64", shape=[16]), "is of unknown type C64"),
    ("bert", WEIGHTS, entry(dtype=[]), "expected string or map"),
    ("bert", WEIGHTS, entry(shape=[-1, -2]), "invalid value: integer `-1`"),
    ("bert", WEIGHTS, entry(shape=[32.0]), "invalid type: floating point `32.0`"),
    ("bert", WEIGHTS, entry(shape="32"), "expected a sequence"),
    ("bert", WEIGHTS, entry(shape=[5, 5]), "invalid shape, data type, or offset"),
    ("bert", WEIGHTS, entry(data_offsets=[0, 1, 2]), "expected 2 elements"),
    ("bert", WEIGHTS, entry(data_offsets=[-4, 0]), "invalid value: integer `-4`"),
    ("bert", WEIGHTS, entry(shape=[1], data_offsets=[4, 8]), "invalid offset for tensor"),
    ("bert", WEIGHTS, entry(shape=[1], data_offsets=[10**9, 10**9 + 4]), "invalid offset for"),
    ("bert", WEIGHTS, os.unlink, "no model.safetensors here"),
    (
        "llama",
        WEIGHTS,
        shards(lambda places: {**places, "extra": "model-2.safetensors"}),
        f"{INDEX}: it names model-2.safetensors, which is not there",
    ),
    (
        "llama",
        WEIGHTS,
        shards(lambda places: {**places, "gone": SHARD}),
        f"{SHARD}: 1 tensors are missing that the index places here: 'gone'",
    ),
    *(
        ("llama", WEIGHTS, shards(lambda places, n=name: {**places, "extra": n}), message)
        for name, message in (
            ("../x.safetensors", f"{INDEX}: it names '../x.safetensors'; expected a path inside"),
            ("a/../../x", f"{INDEX}: it names 'a/../../x'; expected a path inside"),
            ("/etc/passwd", f"{INDEX}: it names '/etc/passwd'; expected a path inside"),
            ("a\0b", f"{INDEX}: it names 'a\\x00b'; expected a path inside"),
            ("", f"{INDEX}: it names "),
            (3, f"{INDEX}: weight_map.extra is 3; expected a string"),
            (None, f"{INDEX}: field 'weight_map.extra' is missing"),
        )
    ),
    ("llama", WEIGHTS, shards(lambda places: {}), f"{INDEX}: it lists no weights files"),
    ("llama", WEIGHTS, shards(list), f"{INDEX}: weight_map is ['model.embed_tokens.weight', "),
    ("bert", "tokenizer.json", text("{"), "tokenizer.json: not a readable tokenizer"),
    ("bert", "tokenizer.json", text("[]"), "tokenizer.json: not a readable tokenizer"),
    ("llama", "tokenizer.json", cut(1000), "tokenizer.json: not a readable tokenizer"),
    ("llama", "config.json", fields(vocab_size=100), "vocab_size is 100, but the tokenizer here"),
    *(
        ("llama", "tokenizer_config.json", fields(**{name: value}), f"{name} is {value!r}; expec")
        for name, value in (
            ("model_max_length", "64"),
            ("model_max_length", 0),
            ("model_max_length", 1.5),
            ("model_max_length", float("nan")),
            ("model_input_names", "input_ids"),
            ("clean_up_tokenization_spaces", "no"),
            ("eos_token", 3),
            ("eos_token", ["x"]),
        )
    ),
    ("llama", "tokenizer_config.json", fields(padding_side="up"), "padding_side 'up' is not supp"),
    ("llama", "tokenizer_config.json", fields(eos_token={}), "'eos_token.content' is missing"),
    ("llama", "special_tokens_map.json", fields(sep_token=3), "_map.json: sep_token is 3; expect"),
    ("llama", "tokenizer_config.json", template(3), "chat_template is 3; expected a string"),
    ("llama", "tokenizer_config.json", template([3]), "chat_template is [3]; expected a list of"),
    ("llama", "tokenizer_config.json", template([{}]), "field 'chat_template.name' is missing"),
    ("llama", "tokenizer_config.json", template("\ud800"), "expected a string"),
    ("llama", "chat_template.jinja", text(b"\xff"), "chat_template.jinja: not UTF-8"),
    ("llama", "chat_template.jinja", text(""), "its chat template makes nothing of a user's"),
    *(
        ("llama", "chat_template.jinja", text(content), f"its chat template cannot be {reason}")
        for content, reason in (
            ("{% if %}", "applied: TemplateSyntaxError: Expected an expression"),
            ("{{ 1 / 0 }}", "applied: ZeroDivisionError"),
            ("{{ messages[5].content.x }}", "applied: UndefinedError"),
            ("{{ raise_exception('a system message, please') }}", "applied: TemplateError: a syst"),
        )
    ),
    *(
        ("llama", "generation_config.json", fields(eos_token_id=value), "eos_token_id is ")
        for value in ("2", 1.5, True, -1, 400, 10**30, [], [2, "3"], {})
    ),
    ("bert", "modules.json", text("3"), "modules.json: expected a list of JSON objects"),
    ("bert", "modules.json", text("[3]"), "modules.json: expected a list of JSON objects"),
    ("bert", "modules.json", text("[]"), "modules.json: modules are ''; supported"),
    ("bert", "modules.json", text("[{}]"), "modules.json: field 'type' is missing"),
    *(
        ("bert", "modules.json", modules(n, type=kind), f"{kind}, {next_one}")
        for n, kind, next_one in (
            (1, "CNN", "Normalize"), (0, "own.Transformer", "Pooling"), (1, "own.Pooling", "Norm")
        )
    ),
    ("bert", "modules.json", modules(2, type=3), "modules.json: type is 3; expected a string"),
    ("bert", "modules.json", modules(1, path=None), "modules.json: field 'path' is missing"),
    ("bert", "modules.json", modules(1, path="../x"), "modules.json: it names '../x'; expected a"),
    ("bert", "modules.json", modules(1, path="gone"), "gone/config.json: no such file"),
    ("bert", "modules.json", modules(0, path="0_Transformer"), "Transformer is in '0_Transformer'"),
    ("bert", "1_Pooling/config.json", fields(pooling_mode="max"), "pooling 'max' is not supported"),
    ("bert", "1_Pooling/config.json", fields(pooling_mode=[]), "pooling '' is not supported; supp"),
    ("bert", "1_Pooling/config.json", fields(include_prompt="no"), "include_prompt='no' is not"),
    (
        "bert",
        "1_Pooling/config.json",
        text('{"pooling_mode_mean_tokens": "false"}'),
        "pooling_mode_mean_tokens is 'false'; expected true or false",
    ),
    ("bert", "sentence_bert_config.json", fields(max_seq_length="64"), "max_seq_length is '64'; "),
    (
        "bert", "config_sentence_transformers.json", fields(truncate_dim=8),
        "truncate_dim=8 is not supported; null has vectors of the whole width",
    ),
    ("bert", "sentence_bert_config.json", fields(max_seq_length=-1), "max_seq_length is -1; expe"),
    ("bert", "config_sentence_transformers.json", fields(prompts=["x"]), "prompts is ['x']; exp"),
    (
        "bert",
        "config_sentence_transformers.json",
        fields(prompts={"query": 3}),
        "prompts.query is 3; expected a string",
    ),
]  # fmt: skip


def load(path):
    """Loads a model and uses it as far as its files matter."""
    if path.name == "bert":
        load_retriever(str(path))[0].token_ids(["Pads an array.", "naïve 東京 \U0010ffff"])
    else:
        generator, _ = load_generator(str(path))
        generator.decode(generator.chat_ids("Pads an array, naïve 東京 \U0010ffff.", 50)[0])


@pytest.fixture
def model(tmp_path):
    def copy(name):
        return shutil.copytree(DATA / f"tiny-{name}", tmp_path / name)

    return copy


@pytest.mark.parametrize(("name", "file", "spoil", "message"), SPOILT)
def test_a_spoilt_file_is_named(model, name, file, spoil, message):
    path = model(name)
    spoil(path / file)
    assert message in complaint_of(lambda: load(path), path)


def test_an_empty_directory(tmp_path):
    assert "config.json: no such file" in complaint_of(lambda: load(tmp_path), tmp_path)


def test_a_tensor_in_two_shards(model):
    path = model("llama")
    shards(lambda places: {**places, "extra": "other.safetensors"})(path / WEIGHTS)
    norm = np.ones(32, np.float32)
    write_plain_safetensors(path / "other.safetensors", {"extra": norm, "model.norm.weight": norm})
    message = "other.safetensors: tensor 'model.norm.weight' is there twice"
    assert message in complaint_of(lambda: load(path), path)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_mutations_of_a_directory_are_refused_in_one_line_or_load(model, name):
    path, rng, refused = model(name), random.Random(name), 0
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for number in range(80):
        file = files[number % len(files)]
        data = file.read_bytes()
        # A weights file's header says where everything is.
        head = min(len(data), 3000 if file.name == WEIGHTS else len(data))
        file.write_bytes(mutate(data[:head], rng) + data[head:])
        try:
            load(path)
        except UserError as error:
            refused += 1
            check_complaint(str(error), path)
        file.write_bytes(data)
    assert refused > 40


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, tiny_models.torch_model("llama", head=True), "llama")
    return path.read_bytes()


def test_mutations_of_a_gguf_file_are_refused_in_one_line_or_load(gguf_bytes, tmp_path):
    path, rng, refused = tmp_path / "model.gguf", random.Random(0), 0
    head = gguf_bytes.index(b"output_norm") + 2000
    for _ in range(100):
        path.write_bytes(mutate(gguf_bytes[:head], rng) + gguf_bytes[head:])
        try:
            load(path)
        except UserError as error:
            refused += 1
            check_complaint(str(error), path)
    assert refused > 50


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # A key, the type of its value (4 is uint32, 6 float32), and the value.
        (("llama.block_count", "II", 4, 3), (4, 0), "llama.block_count is 0; expected a whole nu"),
        (("llama.block_count", "II", 4, 3), (4, 10**9), "num_hidden_layers is 1000000000; expecte"),
        (("llama.block_count", "II", 4, 3), (6, 3), "llama.block_count is 4.2"),
        (("llama.attention.head_count", "II", 4, 4), (4, 3), "num_attention_heads is 3; expected"),
        (("llama.attention.head_count_kv", "II", 4, 2), (4, 0), "head_count_kv is 0; expected a"),
        (("tokenizer.ggml.eos_token_id", "II", 4, 2), (4, 96), "eos_token_id is 96; expected"),
    ],
)
def test_metadata_of_a_gguf_file_is_named(gguf_bytes, tmp_path, old, new, message):
    path, (key, form, *before) = tmp_path / "model.gguf", old
    whole = key.encode() + struct.pack("<" + form, *before)
    assert gguf_bytes.count(whole) == 1
    path.write_bytes(gguf_bytes.replace(whole, key.encode() + struct.pack("<" + form, *new)))
    assert message in complaint_of(lambda: load(path), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (text("{"), "adapter_config.json: not readable JSON"),
        (text("[]"), "adapter_config.json: it is []; expected a JSON object"),
        (fields(peft_type=["LORA"]), "peft_type ['LORA'] is not supported; supported: LORA"),
        (fields(r=0), "adapter_config.json: r is 0; expected a whole number from 1"),
        (fields(lora_dropout="0.1"), "lora_dropout is '0.1'; expected a number from 0 to 1"),
        (fields(init_lora_weights=""), "init_lora_weights='' changes the base too"),
        (fields(use_dora="x" * 10_000), "use_dora='xxx"),
        (lambda path: cut(-10)(path.with_name("adapter_model.safetensors")), "not fully covered"),
    ],
)
def test_a_spoilt_adapter_is_named(tmp_path, spoil, message):
    base, directory = DATA / "tiny-llama", tmp_path / "adapter"
    module, params, _ = load_model(str(base))
    lora = LoraConfig(rank=2, alpha=4.0)
    adapter = init_lora(jax.random.key(0), params, config=lora)
    export_adapter(directory, adapter, lora, module.config, str(base))
    load(directory)
    spoil(directory / "adapter_config.json")
    assert message in complaint_of(lambda: load(directory), directory)
