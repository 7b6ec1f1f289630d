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
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from eval import tiny_models
from expandr_jax.errors import UserError
from expandr_jax.weights.tokenizer import read_tokenizer
from tests.file_options import edit

TEXTS = [
    "ab a  b", " ab", "a </s> b<s>ab", "", "  ", "a\nb \n c ", "\u00c9a b", "ab \u65e5\u672c",
    "a</s>b ab", "12 a12", "\u00c9 e\u0301",
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


def letter_bytes(style):
    """Bytes, of texts whose digits are cut apart, or whose letters are made alike, or neither."""
    words = ["<s>", "</s>", "<unk>", *sorted(ByteLevel.alphabet()), "12", "\u00c3\u012b"]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab, [("1", "2"), ("\u00c3", "\u012b")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=style == "plain")
    if style == "digits":
        cut = [pre_tokenizers.Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(cut)
    if style == "alike":
        backend.normalizer = normalizers.Lowercase()
    backend.decoder = decoders.ByteLevel()
    return backend, ["<s>", "</s>", "<unk>"]


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
        (unigrams, ("cut", "spaces"), ("LlamaTokenizerFast", "XLMRobertaTokenizer", None),
         "modernbert"),
        (pairs, ("old",), ("LlamaTokenizer",), "modernbert"),
        (pairs, ("old", "late"), ("GemmaTokenizerFast", None), "gemma3_text"),
        (letter_bytes, ("plain", "digits", "alike"), ("Qwen2Tokenizer", None), "qwen3"),
        (letter_bytes, ("plain", "digits", "alike"), ("LlamaTokenizerFast", "TokenizersBackend"),
         "qwen2"),
        (letter_bytes, ("plain", "alike"), ("TokenizersBackend",), "qwen3"),
    ],
)  # fmt: skip
def test_a_class_has_the_ids_of_transformers(tmp_path, make, styles, kinds, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = [{}, {"add_prefix_space": False}, {"add_prefix_space": True}]
    settings += [{"legacy": True}, {"legacy": False}] if make is pairs else []
    special = SPECIAL | MORE if make is unigrams else SPECIAL
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
    plain = ("GemmaTokenizer",), ("TokenizersBackend",)
    if kinds not in plain and model_type not in ("mistral", "modernbert"):
        assert changed


def letters(_):
    """Word pieces with letters of both cases, as the file has them."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcABC", "\u00c9", "\u00e9", "e"]
    words += [f"##{word}" for word in words[5:]]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def roberta_bytes(_):
    """Bytes with a space before each text, as the file has it."""
    vocab = [*SPECIAL.values(), "<pad>", "<mask>", *sorted(ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(vocab)}, []))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=True)
    return backend, ["<s>", "</s>", "<unk>", "<pad>", "<mask>"]


@pytest.mark.parametrize(
    ("make", "kind", "model_type", "changes"),
    [
        (letters, None, "bert", True),
        (letters, "DistilBertTokenizerFast", "bert", True),
        (letters, "NoSuchTokenizer", "bert", False),
        (letters, None, "modernbert", False),
        (letters, "BertTokenizerFast", "modernbert", False),
        (roberta_bytes, None, "roberta", True),
        (roberta_bytes, "TokenizersBackend", "roberta", False),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_which_class_it_is(tmp_path, make, kind, model_type, changes, file):
    """Named by tokenizer_config.json, else by config.json, else the family's, if it has one."""
    backend, tokens = make(None)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "tokenizer_config.json", **SPECIAL, **MORE)
    edit(tmp_path / "config.json", model_type=model_type)
    edit(tmp_path / file, **({"tokenizer_class": kind} if kind else {}))
    texts = ["ab", "AB \u00c9 cA", " a"]
    right = AutoTokenizer.from_pretrained(tmp_path)(texts, add_special_tokens=False)["input_ids"]
    found = read_tokenizer(tmp_path, model_type)(texts, add_special_tokens=False)["input_ids"]
    assert found == right
    assert ([row.ids for row in backend.encode_batch(texts)] != right) == changes


def test_unigrams_of_a_llama_are_as_their_file_has_them(tmp_path):
    """As in version 4 of transformers; of 5, the class has pairs alone."""
    backend, tokens = unigrams("cut")
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in tokens])
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "tokenizer_config.json", **SPECIAL, tokenizer_class="LlamaTokenizer")
    found = read_tokenizer(tmp_path, "llama")(TEXTS, add_special_tokens=False)["input_ids"]
    assert found == [row.ids for row in backend.encode_batch(TEXTS, add_special_tokens=False)]


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
    file = json.loads((tmp_path / "tokenizer.json").read_text())
    file["model"]["unk_id"] = 2  # As the class has it.
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    texts = [text for text in TEXTS if not {*text} & {*"\u00c9\u65e512"}]  # All are known.
    right = AutoTokenizer.from_pretrained(tmp_path)(texts)["input_ids"]
    assert read_tokenizer(tmp_path, "t5")(texts)["input_ids"] == right


def test_mistral_s_mended_pattern_is_in_the_file_or_refused(tmp_path):
    """transformers patches it into the tokenizer of a config.json that an older version wrote."""
    words = [*sorted(ByteLevel.alphabet()), *map("<{}>".format, range(100_000))]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    edit(tmp_path / "config.json", model_type="mistral")
    cut = pre_tokenizers.Split(Regex(r"\p{L}+|."), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "config.json", transformers_version="4.57.1")
    edit(tmp_path / "tokenizer_config.json", fix_mistral_regex=False)
    read_tokenizer(tmp_path, "mistral")
    edit(tmp_path / "tokenizer_config.json", fix_mistral_regex=True)
    with pytest.raises(UserError, match="fix_mistral_regex=True is not supported; transformers"):
        read_tokenizer(tmp_path, "mistral")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    right = theirs(["aBc De fGH 123"])["input_ids"]
    theirs.save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", fix_mistral_regex=True)
    assert read_tokenizer(tmp_path, "mistral")(["aBc De fGH 123"])["input_ids"] == right


def test_a_field_that_nobody_knows_is_said(tmp_path, caplog):
    tiny_models.save(tmp_path, "llama")
    read_tokenizer(tmp_path, "llama")
    assert not caplog.messages
    edit(tmp_path / "tokenizer_config.json", reads_backwards=True, image_token="<i>", stride=0)
    read_tokenizer(tmp_path, "llama")
    (said,) = caplog.messages
    assert said.endswith("tokenizer_config.json: not known here, and not read: reads_backwards")
