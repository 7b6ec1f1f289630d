"""Classes of transformers that make a part of tokenizer.json anew: ids are those of AutoTokenizer.

Of bge-m3, a space before a special token or at a text's end is a token in tokenizer.json alone; of
Llama 2's kind, what follows a special token begins with a space there.
"""

import json

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from eval import tiny_models
from expandr_jax.weights.tokenizer import read_tokenizer
from tests.file_options import edit

TEXTS = [
    "ab a  b", " ab", "a </s> b<s>ab", "", "  ", "a\nb \n c ", "\u00c9a b", "ab \u65e5\u672c",
    "a</s>b ab",
]  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MORE = {"sep_token": "</s>", "cls_token": "<s>", "pad_token": "<pad>", "mask_token": "<mask>"}
PIECES = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab", "c", "\u2581b"]


def pairs(style):
    """SentencePiece's pairs as tokenizer.json has them of old, and of late."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581a", "b"), ("\u2581", "b"), ("\u2581", "ab")]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    mark = normalizers.Replace(" ", "\u2581")
    if style == "old":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), mark])
    elif style == "late":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif style == "bare":
        backend.normalizer = mark
    else:  # Llama 3's, DeepSeek's: transformers#45488.
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
        backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return backend, ["<unk>", "<s>", "</s>"]


def unigrams(style):
    """Unigrams with or without a cut at white space, and letters that are made alike."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "<mask>"]
    backend = Tokenizer(models.Unigram([(w, -float(len(w) < 3)) for w in words], unk_id=3))
    alike = [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(alike) if style == "spaces" else alike[0]
    marks = pre_tokenizers.Metaspace()
    backend.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), marks])
        if style == "cut"
        else marks
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return backend, ["<s>", "<pad>", "</s>", "<unk>"]


@pytest.mark.parametrize(
    ("make", "styles", "kinds", "model_type"),
    [
        (pairs, ("old", "late", "bare", "bytes"), ("LlamaTokenizer", "LlamaTokenizerFast", None),
         "llama"),
        (pairs, ("old", "late"), ("LlamaTokenizer", "PreTrainedTokenizerFast"), "mistral"),
        (pairs, ("bare",), ("GemmaTokenizer",), "gemma3_text"),
        (unigrams, ("cut", "spaces", "bare"), ("XLMRobertaTokenizer", None), "xlm-roberta"),
        (unigrams, ("spaces",), ("XLMRobertaTokenizerFast",), "bert"),
        (unigrams, ("spaces", "bare"), ("CamembertTokenizer", "PreTrainedTokenizerFast"),
         "camembert"),
    ],
)  # fmt: skip
def test_a_class_has_the_ids_of_transformers(tmp_path, make, styles, kinds, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = [{}, {"add_prefix_space": False}, {"add_prefix_space": True}]
    settings += [{"legacy": True}, {"legacy": False}] if make is pairs else []
    special = SPECIAL if make is pairs else SPECIAL | MORE
    changed = 0
    for style in styles:
        backend, tokens = make(style)
        backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
        backend.save(str(tmp_path / "tokenizer.json"))
        for kind in kinds:
            for given in settings:
                fields = {**special, **given, **({"tokenizer_class": kind} if kind else {})}
                (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
                right = AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"]
                found = read_tokenizer(tmp_path, model_type)
                assert found(TEXTS)["input_ids"] == right, (style, kind, given)
                changed += [row.ids for row in backend.encode_batch(TEXTS)] != right
    if kinds != ("GemmaTokenizer",) and model_type != "mistral":
        assert changed


def test_t5_cuts_at_white_space_whatever_its_file_says(tmp_path):
    backend, tokens = unigrams("bare")
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    fields = {**SPECIAL, "pad_token": "<pad>", "extra_ids": 0, "tokenizer_class": "T5Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    texts = [text for text in TEXTS if "\u00c9" not in text and "\u65e5" not in text]
    right = AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    assert read_tokenizer(tmp_path, "t5")(texts)["input_ids"] == right


def test_a_field_that_nobody_knows_is_said(tmp_path, caplog):
    tiny_models.save(tmp_path, "llama")
    read_tokenizer(tmp_path, "llama")
    assert not caplog.messages
    edit(tmp_path / "tokenizer_config.json", reads_backwards=True, image_token="<i>", stride=0)
    read_tokenizer(tmp_path, "llama")
    (said,) = caplog.messages
    assert said.endswith("tokenizer_config.json: not known here, and not read: reads_backwards")
