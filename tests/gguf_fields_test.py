"""What the metadata of a GGUF file say is obeyed, as in llama.cpp, or refused by name."""

import struct

import gguf
import pytest

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights import gguf_tokenizer
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.gguf_reader import GgufReader
from expandr_jax.weights.hf import load_generator, load_retriever
from tests.gguf_test import DEEP, write_gguf


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_models.torch_model(kind, head=True) for kind in ("llama", "qwen3")}


@pytest.fixture
def written(models, tmp_path, monkeypatch):
    """Writes a file of an architecture with more metadata: (architecture, {key: value}) -> path."""

    def write(architecture, values, **options):
        write_header = gguf.GGUFWriter.write_header_to_file

        def with_more(writer):
            for key, value in values.items():
                kinds = {
                    bool: "bool",
                    int: "uint32",
                    float: "float32",
                    str: "string",
                    list: "array",
                }
                getattr(writer, f"add_{kinds[type(value)]}")(key, value)
            write_header(writer)

        monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", with_more)
        path = tmp_path / "model.gguf"
        write_gguf(path, models[architecture], architecture, **options)
        monkeypatch.undo()
        return str(path)

    return write


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"general.type": "adapter"}, "general.type='adapter' is not supported; only 'model' is"),
        ({"split.count": 3}, "it is one of 3 parts: join them"),
        ({"llama.attention.causal": False}, "llama.attention.causal=False is not supported"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale=0.5 is not supported"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length=4 is not supported"),
        ({"llama.attention.sliding_window": 5}, "llama.attention.sliding_window is 5; expected no"),
        ({"llama.rope.dimension_count": 4}, "llama.rope.dimension_count=4 is not supported"),
        (
            {"llama.rope.scale_linear": -4.0},
            "llama.rope.scale_linear is -4.0; expected one above",
        ),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported; only 0 is"),
        ({"llama.logit_scale": 2.0}, "llama.logit_scale=2.0 is not supported"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping=30.0 is not"),
        ({"llama.pooling_type": 4}, r"llama.pooling_type is 4; expected 1 \(mean\), 2"),
        ({"llama.what_comes_next": 1}, "llama.what_comes_next=1 is not supported"),
        ({"tokenizer.ggml.what_comes_next": 1}, "tokenizer.ggml.what_comes_next=1 is not support"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(written, values, message):
    with pytest.raises(UserError, match=rf"model.gguf: {message}"):
        load_generator(written("llama", values))


def test_what_changes_nothing_is_read_past(written):
    values = {
        "general.type": "model", "general.sampling.temp": 0.5, "split.count": 0,
        "llama.vocab_size": tiny_models.VOCAB, "llama.rope.dimension_count": 8,
        "llama.attention.value_length": 8, "llama.attention.causal": True,
        "llama.attention.sliding_window": 64, "llama.expert_count": 0,
        "llama.tensor_data_layout": "reference", "tokenizer.ggml.mask_token_id": 1,
        "tokenizer.ggml.fim_pre_token_id": 1, "quantize.imatrix.entries_count": 3,
        "llama.attention.head_dim": 8, "tokenizer.ggml.add_unknown_token": False,
        "tokenizer.ggml.padding_token_id": 2**32 - 1, "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 4.0,
    }  # fmt: skip
    load_generator(written("llama", values))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_are_added_as_the_file_says(written, tmp_path, bos, eos):
    ends = {"tokenizer.ggml.add_bos_token": bos, "tokenizer.ggml.add_eos_token": eos}
    generator, _ = load_generator(written("llama", ends))
    text = [1] * bos + [tiny_models.VOCAB - 1] + [2] * eos
    assert generator.tokenizer("ab").input_ids == text
    # What is obeyed survives the export.
    generator.tokenizer.save_pretrained(tmp_path / "saved")
    saved = type(generator.tokenizer).from_pretrained(tmp_path / "saved")
    assert saved("ab").input_ids == text


def test_every_end_that_is_said_ends_a_text(written):
    ends = {"eot_token_id": 5, "eom_token_id": 6, "eos_token_ids": [2, 7]}
    more = {f"tokenizer.ggml.{name}": value for name, value in ends.items()}
    generator, _ = load_generator(written("llama", more))
    assert generator.eos_ids == (2, 5, 6, 7)


@pytest.mark.parametrize(
    ("values", "factor"),
    [
        ({}, None),
        ({"rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),
        (
            {"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0, "rope.scaling.type": "linear"},
            4.0,
        ),
        ({"rope.scaling.factor": 4.0, "rope.scaling.type": "none"}, None),
    ],
)
def test_positions_are_scaled_as_in_llama_cpp(written, values, factor):
    path = written("llama", {f"llama.{name}": value for name, value in values.items()})
    scaling = load_generator(path)[0].module.config.rope_scaling
    assert (scaling and (scaling.kind, scaling.factor)) == (factor and ("linear", factor))


@pytest.mark.parametrize("kind", [1, 3, 4])  # A word, a control token, one of the user's.
def test_a_token_that_ends_turns_is_one_whatever_its_type(kind):
    tokens = [*"<|im_end>a", "<|im_end|>"]
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": []}
    values |= {"token_type": [1] * (len(tokens) - 1) + [kind]}
    metadata = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    metadata |= {"general.architecture": "llama", "llama.context_length": 64}
    tokenizer = gguf_tokenizer.read_gguf_tokenizer(Fields(metadata, "model.gguf"), len(tokens))
    ids = tokenizer("a<|im_end|>").input_ids
    assert ids == [tokens.index("a"), len(tokens) - 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_what_stands_twice_is_refused(tmp_path):
    """As in llama.cpp and the gguf package; which of the two holds would be chance."""
    key, tensor = b"a" + struct.pack("<II", 4, 7), b"a" + struct.pack("<IQIQ", 1, 1, 0, 0)
    for counts, entry, message in (
        ((0, 2), key, "key 'a' is there twice"),
        ((2, 0), tensor, "it has two tensors of one name"),
    ):
        header = b"GGUF" + struct.pack("<IQQ", 3, *counts)
        (tmp_path / "a.gguf").write_bytes(header + 2 * (struct.pack("<Q", 1) + entry) + bytes(64))
        with pytest.raises(UserError, match=message):
            GgufReader(tmp_path / "a.gguf")


def test_every_tokenizer_key_of_the_package_is_known(written):
    keys = {k for k in vars(gguf.Keys.Tokenizer).values() if str(k).startswith("tokenizer.ggml.")}
    known = {f"tokenizer.ggml.{name}" for name in (*gguf_tokenizer._KEYS, *gguf_tokenizer._UNREAD)}
    assert len(keys) > 20
    assert keys <= known


def test_a_retriever_pools_as_its_file_says(written):
    path = written("qwen3", {"qwen3.pooling_type": 3})
    retriever, _ = load_retriever(path, normalize=True)
    assert retriever.pooling == "last"
    retriever, _ = load_retriever(path, pooling="mean", normalize=True)
    assert retriever.pooling == "mean"
    with pytest.raises(UserError, match="pooling and normalize must be given"):
        load_retriever(written("qwen3", {"qwen3.pooling_type": 0}), normalize=True)


def renamed(names, more):
    """Changes keys of a file that is being written: new names, None to leave one out, and more."""

    def change(writer):
        known = writer.kv_data[-1]
        for old, new in names.items():
            value = known.pop(old)
            known.update({new: value} if new else {})
        for key, value in more.items():
            known.pop(key, None)
            kind = {bool: "bool", int: "uint32", float: "float32", list: "array"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)

    return change


GLOBAL, LOCAL = "gemma3.rope.global.freq_base", "gemma3.rope.local.freq_base"
OLLAMA = {
    "gemma3.rope.freq_base": GLOBAL, "gemma3.attention.layer_norm_rms_epsilon": None,
}  # fmt: skip
SLIDES = [True, True, True, True, True, False, True]


@pytest.mark.parametrize(
    ("names", "more"),
    [
        (OLLAMA, {LOCAL: 10000.0}),
        ({}, {LOCAL: 10000.0, GLOBAL: 1000000.0}),
        ({"gemma3.rope.freq_base": None}, {LOCAL: 10000.0}),
        ({}, {"gemma3.attention.sliding_window_pattern": SLIDES}),
    ],
)
def test_keys_of_ollama_s_converter_mean_llama_cpp_s(tmp_path, monkeypatch, names, more):
    model = tiny_models.torch_model("gemma3", head=True, **DEEP)
    write_gguf(tmp_path / "plain.gguf", model, "gemma3")
    plain, _ = load_generator(str(tmp_path / "plain.gguf"))
    write_header, change = gguf.GGUFWriter.write_header_to_file, renamed(names, more)
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_header_to_file", lambda w: (change(w), write_header(w))
    )
    write_gguf(tmp_path / "ollama.gguf", model, "gemma3")
    found, _ = load_generator(str(tmp_path / "ollama.gguf"))
    assert found.module.config == plain.module.config
    assert found.module.config.rope_theta == 1e6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({GLOBAL: 5.0}, "gemma3.rope.global.freq_base is 5.0; expected the same as"),
        (
            {LOCAL: 10000.0, "gemma3.context_length": 131072},
            "gemma3.context_length is 131072; expected at most 32768 where Ollama left",
        ),
        (
            {"gemma3.attention.sliding_window_pattern": SLIDES[1:]},
            "layer_types has 6 entries for 7 layers",
        ),
        ({"gemma3.attention.sliding_window_pattern": 5}, "sliding_window_pattern=5 is not"),
        ({"gemma3.mm.tokens_per_image": 256}, "gemma3.mm.tokens_per_image=256 is not supported"),
    ],
)
def test_what_ollama_s_converter_leaves_open_is_refused(tmp_path, monkeypatch, more, message):
    model = tiny_models.torch_model("gemma3", head=True, **DEEP)
    write_header, change = gguf.GGUFWriter.write_header_to_file, renamed({}, more)
    monkeypatch.setattr(
        gguf.GGUFWriter, "write_header_to_file", lambda w: (change(w), write_header(w))
    )
    write_gguf(tmp_path / "model.gguf", model, "gemma3")
    with pytest.raises(UserError, match=message):
        load_generator(str(tmp_path / "model.gguf"))


def test_special_tokens_beyond_the_table_are_refused_in_texts_alone(models, tmp_path, monkeypatch):
    """As Gemma's token for images, which its text model has no row for."""
    add = gguf.GGUFWriter.add_token_list, gguf.GGUFWriter.add_token_types
    monkeypatch.setattr(gguf.GGUFWriter, "add_token_list", lambda w, v: add[0](w, [*v, "<image>"]))
    for kind, message in ((3, "token '<image>' has id 96"), (1, "the tokenizer here has 97")):
        monkeypatch.setattr(
            gguf.GGUFWriter, "add_token_types", lambda w, v, kind=kind: add[1](w, [*v, kind])
        )
        write_gguf(path := tmp_path / f"{kind}.gguf", models["llama"], "llama")
        with pytest.raises(UserError, match=message):
            load_generator(str(path))[0].token_ids(["ab", "an <image>"])
    generator, _ = load_generator(str(tmp_path / "3.gguf"))
    assert generator.token_ids(["ab"]) == [[95]]


def test_templates_by_name_are_read(written):
    named = {"tokenizer.chat_templates": ["tool_use"], "tokenizer.chat_template.tool_use": "tools"}
    generator, _ = load_generator(written("llama", named))
    assert generator.tokenizer.chat_template == {
        "default": tiny_models.TEMPLATE, "tool_use": "tools"
    }  # fmt: skip
    assert generator.chat_text("ab") == load_generator(written("llama", {}))[0].chat_text("ab")
