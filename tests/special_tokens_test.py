"""Special tokens that tokenizer.json lacks are those that transformers adds, from each file."""

import json

import pytest
from transformers import AutoTokenizer

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights.export import export_generator
from expandr_jax.weights.hf import load_generator
from expandr_jax.weights.tokenizer import read_tokenizer
from tests.file_options import edit

FLAGS = {"content": "<|x|>", "lstrip": True, "rstrip": False, "normalized": False, "special": True}
TYPED = {"__type": "AddedToken", **FLAGS}
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEXTS = ["a <|x|> b<|y|>ab", " <|x|> </s> a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_models.save(path, "llama", head=True)
    settings = json.loads((path / CONFIG).read_text())
    del settings["tokenizer_class"]
    (path / CONFIG).write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "files",
    [
        {CONFIG: {"additional_special_tokens": ["<|x|>", "<|y|>"]}},
        {CONFIG: {"extra_special_tokens": ["<|x|>"], "additional_special_tokens": ["<|y|>"]}},
        {CONFIG: {"extra_special_tokens": [], "additional_special_tokens": ["<|y|>"]}},
        {CONFIG: {"extra_special_tokens": {"image_token": "<|x|>"}}},
        {CONFIG: {"additional_special_tokens": [TYPED]}},
        {CONFIG: {"additional_special_tokens": ["a"]}},
        {CONFIG: {"image_token": "<|x|>", "eos_token": TYPED}},
        {CONFIG: {"image_token": TYPED}, MAP: {"additional_special_tokens": None}},
        {MAP: {"additional_special_tokens": ["<|x|>"]}},
        {MAP: {"extra_special_tokens": {"image_token": "<|x|>"}}},
        {MAP: {"image_token": FLAGS}},
        {CONFIG: {"additional_special_tokens": ["<|y|>"]},
         MAP: {"extra_special_tokens": ["<|x|>"]}},
        {CONFIG: {"additional_special_tokens": ["<|y|>"]},
         MAP: {"additional_special_tokens": ["<|x|>"]}},
        {MAP: {"eos_token": "<|x|>"}},
        {MAP: {"eos_token": FLAGS}},
        {MAP: {"eos_token": None}},
        {CONFIG: {"added_tokens_decoder": {}}, MAP: {"mask_token": "<|x|>", "eos_token": "<|y|>"},
         ADDED: {"<|x|>": 96}},
        {ADDED: {"<|x|>": 97, "ab": 96}},
        {CONFIG: {"additional_special_tokens": ["<|x|>"]}, ADDED: {"<|x|>": 97, "ab": 96}},
    ],
)  # fmt: skip
def test_tokens_beside_tokenizer_json_are_transformers_own(model, tmp_path, files):
    for name in ("tokenizer.json", "config.json", CONFIG):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    for name, fields in files.items():
        edit(tmp_path / name, **fields)
    right, found = AutoTokenizer.from_pretrained(tmp_path), read_tokenizer(tmp_path, "llama")
    assert found(TEXTS)["input_ids"] == right(TEXTS)["input_ids"]
    assert found.special_tokens_map == right.special_tokens_map
    assert found.all_special_tokens == right.all_special_tokens


def test_flags_hold_where_transformers_5_has_no_reader(model, tmp_path):
    """Files of its version 4 have them without a type; version 5 raises."""
    for name in ("tokenizer.json", "config.json", CONFIG):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    edit(tmp_path / MAP, additional_special_tokens=[FLAGS])
    with pytest.raises(TypeError):
        AutoTokenizer.from_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, "llama")
    assert found("a <|x|>", add_special_tokens=False)["input_ids"] == found.convert_tokens_to_ids(
        ["a", "<|x|>"]
    )


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (CONFIG, {"additional_special_tokens": "<x>"}, "is '<x>'; expected a list of tokens"),
        (CONFIG, {"extra_special_tokens": ["<x>", 3]}, "extra_special_tokens.1 is 3; expected a"),
        (MAP, {"extra_special_tokens": {"image_token": 3}}, "image_token is 3; expected a string"),
        (ADDED, {"<x>": "96"}, "<x> is '96'; expected a whole number"),
    ],
)
def test_tokens_that_are_none_are_named(model, tmp_path, name, fields, message):
    for file in ("tokenizer.json", CONFIG):
        (tmp_path / file).write_bytes((model / file).read_bytes())
    edit(tmp_path / name, **fields)
    with pytest.raises(UserError) as error:
        read_tokenizer(tmp_path, "llama")
    assert name in str(error.value)
    assert message in str(error.value)


def test_an_added_token_that_has_a_row_survives_an_export(tmp_path):
    """As in models whose table has more rows than their tokenizer has tokens."""
    tiny_models.save(tmp_path / "model", "llama", head=True, vocab_size=104)
    edit(tmp_path / "model" / CONFIG, additional_special_tokens=["<|x|>"], image_token="<|y|>")
    generator, params = load_generator(str(tmp_path / "model"))
    assert generator.token_ids(["<|x|><|y|>"]) == [[97, 96]]
    export_generator(tmp_path / "export", generator, params)
    for tokenizer in (
        load_generator(str(tmp_path / "export"))[0].tokenizer,
        AutoTokenizer.from_pretrained(tmp_path / "export"),
    ):
        assert tokenizer("<|x|><|y|>", add_special_tokens=False)["input_ids"] == [97, 96]
        assert tokenizer.special_tokens_map["image_token"] == "<|y|>"
