"""What users' files say is obeyed, or refused by name: by `tests.file_options`, and more."""

import json
import pathlib

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, tokenization_utils_base

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights import source
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.tokenizer import read_tokenizer
from tests import file_options

POOLED = {"pooling": "last", "normalize": True}
VECTORS = file_options.their_vectors, file_options.our_vectors


@pytest.mark.parametrize(("count", "seed"), [(6, 2), pytest.param(40, 0, marks=pytest.mark.slow)])
def test_every_combination_is_the_peer_s_or_refused(count, seed):
    said = []
    verdicts = file_options.run(count, seed, said.append)
    assert not verdicts["WRONG"], "\n".join(said)
    assert verdicts["equal"] >= count // 3


@pytest.fixture
def llama(tmp_path):
    tiny_models.save(tmp_path, "llama", head=True)
    return tmp_path


def test_a_token_beyond_the_table_is_refused_in_a_template_and_in_a_text(llama):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(llama)
    generator, _ = load_generator(str(llama))  # No text has it yet.
    for text in ("<|new|>", "so <|new|> it is"):
        with pytest.raises(UserError, match=r"token '<\|new\|>' has id 96, but .* has 96 rows"):
            generator.chat_ids(text, 99)
    retriever, _ = load_retriever(str(llama), **POOLED)
    with pytest.raises(UserError, match=r"token '<\|new\|>' has id 96"):
        retriever.token_ids(["fine", "a <|new|>"])
    tokenizer.chat_template = "{% for m in messages %}<|new|>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(llama)
    with pytest.raises(UserError, match=r"its chat template: token '<\|new\|>' has id 96"):
        load_generator(str(llama))


@pytest.mark.parametrize(
    ("adds", "flags", "expected"),
    [
        ("", {}, "ab"),
        ("", {"add_bos_token": True}, "<ab"),
        ("<", {"add_eos_token": True}, "<ab>"),
        ("<>", {"add_eos_token": False}, "<ab"),
        ("<", {"add_bos_token": False, "add_eos_token": True}, "ab>"),
        ("<>", {"add_bos_token": False, "add_eos_token": False}, "ab"),
    ],
)
def test_the_flags_of_bos_and_eos_hold(llama, adds, flags, expected):
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    ends = {"<": "<s>", ">": "</s>"}
    parts = [ends[end] for end in adds]
    single = [*parts[: "<" in adds], "$A", *parts["<" in adds :]]
    special = [(part, tokenizer.token_to_id(part)) for part in ends.values()]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=special
    )
    tokenizer.save(str(llama / "tokenizer.json"))
    file_options.edit(llama / "tokenizer_config.json", **flags)
    retriever, _ = load_retriever(str(llama), **POOLED)
    right = [tokenizer.token_to_id(ends.get(part, part)) for part in expected]
    assert retriever.token_ids(["ab"]) == [right]
    assert retriever.token_ids([""]) == [[i for i in right if i in dict(special).values()]]


def test_one_token_may_be_bos_and_eos(llama):
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.TemplateProcessing(
        "</s> $A", "</s> $A $B", [("</s>", end)]
    )
    tokenizer.save(str(llama / "tokenizer.json"))
    flags = {"add_bos_token": True, "add_eos_token": False}
    for given in ({}, flags):
        file_options.edit(llama / "tokenizer_config.json", bos_token="</s>", **given)
        retriever, _ = load_retriever(str(llama), **POOLED)
        assert retriever.token_ids(["a", ""]) == [[end, tokenizer.token_to_id("a")], [end]]


@pytest.mark.parametrize("kind", ["BertTokenizer", "BertTokenizerFast", None, "TokenizersBackend"])
def test_letters_of_a_bert_are_as_its_class_has_them(tmp_path, kind):
    """BERT's own class makes its normalizer by the settings; where none are, it lower-cases."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"aeEé日本", "日本", *("##e", "##é")]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    special = {
        f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")
    }
    found = set()
    for given in ({}, {"do_lower_case": False}, {"strip_accents": False, "do_lower_case": True},
                  {"tokenize_chinese_chars": False}):  # fmt: skip
        settings = {**special, **given, **({"tokenizer_class": kind} if kind else {})}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        (right,) = AutoTokenizer.from_pretrained(tmp_path)(["E é aé 日本"])["input_ids"]
        assert read_tokenizer(tmp_path, "bert")(["E é aé 日本"])["input_ids"] == [right]
        found.add(tuple(right))
    assert len(found) == (1 if kind == "TokenizersBackend" else 4)


@pytest.mark.parametrize("says", [True, False, None])
@pytest.mark.parametrize("file_has", [True, False])
def test_a_space_before_a_text_is_as_roberta_s_class_has_it(tmp_path, says, file_has):
    tiny_models.save(tmp_path, "roberta")
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=file_has)
    backend.save(str(tmp_path / "tokenizer.json"))
    fields = {"tokenizer_class": "RobertaTokenizer"}
    fields |= {} if says is None else {"add_prefix_space": says}
    file_options.edit(
        tmp_path / "tokenizer_config.json", **fields, cls_token="<s>", sep_token="</s>"
    )
    (right,) = AutoTokenizer.from_pretrained(tmp_path)(["ab"], add_special_tokens=False)[
        "input_ids"
    ]
    found = read_tokenizer(tmp_path, "roberta")(["ab"], add_special_tokens=False)["input_ids"]
    assert found == [right]
    assert len(right) == 2 + bool(says)


@pytest.mark.parametrize(
    "said", [{"max_len": 9}, {"max_len": 9, "model_max_length": 20}, {"model_max_length": None}]
)
def test_a_length_by_its_older_name(llama, said):
    config = json.loads((llama / "tokenizer_config.json").read_text())
    config = {name: value for name, value in config.items() if name != "model_max_length"}
    (llama / "tokenizer_config.json").write_text(json.dumps({"max_len": 9, **config, **said}))
    right = AutoTokenizer.from_pretrained(llama).model_max_length
    assert read_tokenizer(llama, "llama").model_max_length == right


def test_a_tokenizer_that_cuts_by_chance_is_refused(tmp_path):
    model = models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"tokenizer.json: model.dropout=0.5 is not supported"):
        read_tokenizer(tmp_path, None)


def test_a_length_above_the_model_s_own_is_said(tmp_path, caplog):
    file_options.write(tmp_path, "bert", "Normalize", [])
    retriever, _ = load_retriever(str(tmp_path / "model"), max_length=50)
    assert retriever.max_length == 50
    assert "texts of up to 50 tokens are read, as max_length says; its files say 40" in caplog.text
    caplog.clear()
    load_retriever(str(tmp_path / "model"), max_length=30)
    assert not caplog.text


@pytest.mark.parametrize("family", ["qwen3", "modernbert", "bert"])
def test_a_length_above_the_model_s_positions(tmp_path, family):
    """Without a table of positions a model reads as far as its file says, as the peer does."""
    file_options.write(tmp_path, family, "Normalize", [])
    file_options.edit(tmp_path / "model" / "sentence_bert_config.json", max_seq_length=500)
    retriever, _ = load_retriever(str(tmp_path / "model"))
    if family == "bert":
        assert retriever.max_length == retriever.module.config.max_positions < 500
        return
    assert retriever.max_length == 500
    right, found = (of(tmp_path / "model") for of in VECTORS)
    for kind in right:
        np.testing.assert_allclose(found[kind], right[kind], atol=1e-4)


def test_texts_that_would_be_put_into_a_chat_template_are_refused(tmp_path):
    (option,) = file_options.setting("sentence_bert_config.json", "modality_config", {
        "text": {"method": "forward", "method_output_name": "last_hidden_state"},
        "message": {"method": "forward", "method_output_name": "last_hidden_state"},
    })  # fmt: skip
    file_options.write(tmp_path, "qwen2", "Normalize", [])
    option.apply(tmp_path / "model")
    with pytest.raises(UserError, match=r"modality_config.message=.* is not supported"):
        load_retriever(str(tmp_path / "model"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "modernbert"])
def test_rope_that_is_said_twice_is_refused(tmp_path, family):
    tiny_models.save(tmp_path, family)
    file_options.edit(tmp_path / "config.json", rope_scaling={"rope_type": "linear", "factor": 4.0})
    with pytest.raises(UserError, match=r"config.json: it has rope_scaling .* and rope_parameters"):
        load_retriever(str(tmp_path), **POOLED)


def test_a_text_without_tokens_is_like_nothing(tmp_path):
    tiny_models.torch_model("qwen2").save_pretrained(tmp_path)
    tiny_models.save_tokenizer(tmp_path, chat=True, pad_id=0)
    for pooling in ("mean", "cls", "last"):
        retriever, params = load_retriever(str(tmp_path), pooling=pooling, normalize=True)
        ids, mask = np.array([[5, 6, 7], [0, 0, 0]]), np.array([[1, 1, 1], [0, 0, 0]])
        vectors = np.asarray(jax.jit(retriever.embed)(params, ids, mask))
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 0], atol=1e-6)


def test_the_hub_is_asked_for_what_loaders_read_alone(tmp_path, monkeypatch):
    import huggingface_hub

    names = (
        "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json",
        "2_Dense/model.safetensors", "2_Dense/pytorch_model.bin", "onnx/model.json",
        "original/params.json", "consolidated.safetensors", "README.md", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    )  # fmt: skip
    kinds = ("Transformer", "Pooling", "Dense")
    listing = [
        {"path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listing))
    fetched = set()

    def download(repo, **patterns):
        assert patterns.pop("revision") is None
        fetched.update(huggingface_hub.utils.filter_repo_objects(names, **patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert source.locate("owner/name") == pathlib.Path(tmp_path)
    assert fetched == {
        "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json",
        "2_Dense/model.safetensors", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip


def test_a_given_document_prompt_stands_for_one_that_the_file_misnames(tmp_path):
    file_options.write(tmp_path, "bert", "vectors", [])
    own = tmp_path / "model" / "config_sentence_transformers.json"
    file_options.edit(own, prompts={"query": "q: ", "passage": "p: "})
    with pytest.raises(UserError, match="its prompts name 'passage' but no 'document'"):
        load_retriever(str(tmp_path / "model"))
    for given in ("p: ", ""):
        retriever, _ = load_retriever(str(tmp_path / "model"), document_prompt=given)
        assert (retriever.query_prompt, retriever.document_prompt) == ("q: ", given)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"path": "0_Transformer"}, "its Transformer is in '0_Transformer'; only one in the"),
        ({"path": "", "type": "sentence_transformers.models.Router"}, "modules are 'Router'; supp"),
    ],
)
def test_modules_are_named_before_files_that_they_have_elsewhere(tmp_path, module, message):
    kinds = ("Transformer", "Pooling") if module["path"] else ("Router",)
    listing = [{"path": f"{k}", "type": f"sentence_transformers.models.{k}"} for k in kinds]
    (tmp_path / "modules.json").write_text(json.dumps([{**listing[0], **module}, *listing[1:]]))
    with pytest.raises(UserError, match=message):
        load_retriever(str(tmp_path))


def test_a_text_that_no_file_limits_is_read_whole(tmp_path):
    """T5 has no table of positions; files say 1e30 for any length, or nothing."""
    tiny_models.save(tmp_path, "t5")
    text = "a b " * 300
    for said in (10**30, None):
        file_options.edit(tmp_path / "tokenizer_config.json", model_max_length=said)
        retriever, _ = load_retriever(str(tmp_path), **POOLED)
        (right,) = AutoTokenizer.from_pretrained(tmp_path)([text])["input_ids"]
        assert retriever.token_ids([text]) == [right]
        assert len(right) > 1000


def test_a_text_beyond_the_model_s_length_is_no_warning(llama, monkeypatch):
    """Whoever encodes it cuts it, as transformers, which warns, does not."""
    said = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", said.append)
    ours, theirs = read_tokenizer(llama, "llama"), AutoTokenizer.from_pretrained(llama)
    text = "how do I pad an array " * 100
    assert len(found := ours(text)["input_ids"]) > ours.model_max_length
    assert not said
    assert theirs(text)["input_ids"] == found
    assert len(said) == 1
