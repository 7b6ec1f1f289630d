"""Whatever tokenizer.json and its settings say, a class has the ids of transformers, or refuses."""

import json

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as cuts
from tokenizers import processors as around
from transformers import AutoTokenizer

from expandr_jax.errors import UserError
from expandr_jax.weights.tokenizer import read_tokenizer
from expandr_jax.weights.tokenizer_classes import CLASSES
from tests.file_options import edit

TEXTS = [
    "E \u00e9 a\u00e9 \u65e5\u672c", "  a  e ", "ee-ae aee", "<mask> e", "[MASK] e<mask>e",
    "a\x00e\u200be", "", "e" * 6, "a'e <new> e", "\u2168 \ufb01 e\u0301", "12 a12", "a\ne\r\n\n e",
    "<s>a</s> e", "ze \U0010ffff", "E" * 101, "a e . e , a 's",
]  # fmt: skip
PAIR = "a E", "e 1"
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MORE = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SPECIAL = {
    "RobertaTokenizer": MORE, "XLMRobertaTokenizer": MORE, "CamembertTokenizer": MORE,
    "MPNetTokenizer": [*MORE, "[UNK]"], "GPT2Tokenizer": ["<|endoftext|>"],
    "Qwen2Tokenizer": ["<|endoftext|>"], "LlamaTokenizer": ["<unk>", "<s>", "</s>"],
    "GemmaTokenizer": ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
    "T5Tokenizer": ["<pad>", "</s>", "<unk>"],
}  # fmt: skip
TYPE = {
    "RobertaTokenizer": "roberta", "XLMRobertaTokenizer": "xlm-roberta",
    "CamembertTokenizer": "camembert", "GPT2Tokenizer": "llama", "Qwen2Tokenizer": "qwen3",
    "LlamaTokenizer": "llama", "GemmaTokenizer": "gemma3_text", "T5Tokenizer": "t5",
}  # fmt: skip
LETTERS = [*"aeEz\u00e912-'", "\u65e5", "\u672c"]


def words(special):
    vocab = [*special, *LETTERS, "\u65e5\u672c", "ee", "<new>", *(f"##{c}" for c in "aeEz12\u00e9")]
    backend = Tokenizer(models.WordPiece(ids(vocab), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = cuts.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def letter_bytes(special):
    alphabet = sorted(cuts.ByteLevel.alphabet())
    vocab = [*special, *alphabet, "\u0120a", "ee", "\u0120e", "12", "eee", "<new>"]
    merges = [("\u0120", "a"), ("e", "e"), ("\u0120", "e"), ("1", "2")]
    backend = Tokenizer(models.BPE(ids(vocab), merges))
    backend.pre_tokenizer = cuts.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def pieces(special):
    vocab = [*special, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *LETTERS, "\u2581a", "ee"]
    merges = [("\u2581", "a"), ("e", "e")]
    unknown = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    backend = Tokenizer(models.BPE(ids([*vocab, "eee", "<new>"]), merges, **unknown))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return backend


def unigrams(special):
    vocab = [*special, "\u2581", *LETTERS, "\u2581a", "ee", "\u2581e", "<new>"]
    scores = [(word, -float(len(word) < 2)) for word in vocab]
    backend = Tokenizer(models.Unigram(scores, unk_id=vocab.index("<unk>")))
    backend.pre_tokenizer = cuts.Sequence([cuts.WhitespaceSplit(), cuts.Metaspace()])
    backend.decoder = decoders.Metaspace()
    return backend


def ids(vocab):
    return {word: number for number, word in enumerate(vocab)}


MAKE = {models.WordPiece: words, models.Unigram: unigrams}


def make(directory, name):
    """A tokenizer of a class as that class writes it; and its special tokens by name."""
    own, special = CLASSES[name], SPECIAL.get(name, BERT)
    build = MAKE.get(own.model, pieces if own.marked else letter_bytes)
    backend = build(special)
    first, last = special[0], special[-1]
    if own.ends:
        first, last = (own.special.get(f"{end}_token") for end in ("cls", "sep"))
        last = last or "</s>"
    ends = [(token, backend.token_to_id(token)) for token in {first, last} if token]
    if own.ends == "eos" or not own.ends:
        backend.post_processor = around.TemplateProcessing(f"$A {last}", None, ends)
    elif own.ends == "sep-sep":
        backend.post_processor = around.RobertaProcessing(
            (last, dict(ends)[last]), (first, dict(ends)[first])
        )
    else:
        backend.post_processor = around.TemplateProcessing(
            f"{first} $A {last}", f"{first} $A {last} $B {last}", ends
        )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    backend.save(str(directory / "tokenizer.json"))
    edit(directory / "config.json", model_type=TYPE.get(name, "bert"))
    extra = {"extra_ids": 0} if name == "T5Tokenizer" else {}
    edit(directory / "tokenizer_config.json", tokenizer_class=name, **own.special, **extra)


def part(kind, value):
    """A part of tokenizer.json."""
    state = value if value is None else json.loads(value.__getstate__())
    return lambda tokenizer, settings: tokenizer.update({kind: state})


def model(**options):
    return lambda tokenizer, settings: tokenizer["model"].update(options)


def config(**fields):
    return lambda tokenizer, settings: settings.update(fields)


def gone(tokenizer, settings):
    for name in [name for name in settings if name.endswith("_token")]:
        del settings[name]


def added(content, **flags):
    def change(tokenizer, settings):
        known = tokenizer["model"]["vocab"]
        known = ids([w for w, _ in known]) if isinstance(known, list) else known
        token = {
            "id": known.get(content, len(known)), "content": content, "single_word": False,
            "lstrip": False, "rstrip": False, "normalized": False, "special": False, **flags,
        }  # fmt: skip
        tokenizer["added_tokens"] = [*tokenizer["added_tokens"], token]

    return change


def listed(*more, leave_out=()):
    """added_tokens_decoder, as transformers writes it."""

    def change(tokenizer, settings):
        for one in more:
            one(tokenizer, settings)
        settings["added_tokens_decoder"] = {
            str(token["id"]): {name: token[name] for name in token if name != "id"}
            for token in tokenizer["added_tokens"]
            if token["content"] not in leave_out
        }

    return change


NORMAL = normalizers
CHANGES = {
    "nothing": lambda tokenizer, settings: None,
    "normalizer none": part("normalizer", None),
    "normalizer lower": part("normalizer", NORMAL.Lowercase()),
    "normalizer NFKC": part("normalizer", NORMAL.NFKC()),
    "normalizer steps": part("normalizer", NORMAL.Sequence(
        [NORMAL.NFD(), NORMAL.Lowercase(), NORMAL.StripAccents()])),
    "normalizer BERT's last": part("normalizer", NORMAL.Sequence(
        [NORMAL.Replace("-", " "), NORMAL.BertNormalizer(lowercase=False)])),
    "normalizer not clean": part("normalizer", NORMAL.BertNormalizer(clean_text=False)),
    "cut none": part("pre_tokenizer", None),
    "cut white space": part("pre_tokenizer", cuts.WhitespaceSplit()),
    "cut digits": part("pre_tokenizer", cuts.Sequence(
        [cuts.Digits(individual_digits=True), cuts.ByteLevel(add_prefix_space=False)])),
    "cut by no pattern": part("pre_tokenizer", cuts.ByteLevel(False, use_regex=False)),
    "cut by another pattern": part("pre_tokenizer", cuts.Sequence(
        [cuts.Split(Regex("a|e"), "isolated"), cuts.ByteLevel(False, use_regex=False)])),
    "cut with a space": part("pre_tokenizer", cuts.ByteLevel(add_prefix_space=True)),
    "model max_input_chars_per_word": model(max_input_chars_per_word=3),
    "model continuing_subword_prefix": model(continuing_subword_prefix="@@"),
    "model end_of_word_suffix": model(end_of_word_suffix="</w>"),
    "model ignore_merges": model(ignore_merges=True),
    "model fuse_unk": model(fuse_unk=False),
    "model byte_fallback": model(byte_fallback=False),
    "model unk_token": model(unk_token="a"),
    "model unk_id": model(unk_id=0),
    "decoder none": part("decoder", None),
    "decoder BPE": part("decoder", decoders.BPEDecoder()),
    "post-processor none": part("post_processor", None),
    "post-processor one side": part("post_processor", around.TemplateProcessing(
        "a $A", "a $A $B", [("a", 5)])),
    "post-processor steps": part("post_processor", around.Sequence([around.ByteLevel(),
        around.TemplateProcessing("$A e", "$A $B e", [("e", 6)])])),
    "post-processor BERT's": part("post_processor", around.BertProcessing(("e", 6), ("a", 5))),
    "unk_token": config(unk_token="a"),
    "cls_token": config(cls_token="a"),
    "sep_token": config(sep_token="a"),
    "bos_token": config(bos_token="a"),
    "eos_token": config(eos_token="a"),
    "mask_token": config(mask_token="a"),
    "mask_token with spaces": config(
        mask_token={"content": "e", "lstrip": True, "__type": "AddedToken"}),
    "unk_token null": config(unk_token=None),
    "cls_token null": config(cls_token=None),
    "eos_token null": config(eos_token=None),
    "no special tokens named": gone,
    "add_bos_token": config(add_bos_token=True),
    "no add_bos_token": config(add_bos_token=False),
    "add_eos_token": config(add_eos_token=True),
    "no add_eos_token": config(add_eos_token=False),
    "add_prefix_space": config(add_prefix_space=True),
    "no add_prefix_space": config(add_prefix_space=False),
    "do_lower_case": config(do_lower_case=False),
    "strip_accents": config(strip_accents=False),
    "tokenize_chinese_chars": config(tokenize_chinese_chars=False),
    "legacy": config(legacy=True),
    "clean_up": config(clean_up_tokenization_spaces=True),
    "clean_up of BPE": config(
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True),
    "wordpieces_prefix": config(wordpieces_prefix="@@"),
    "never_split": config(never_split=["ae"]),
    "added": added("<new>"),
    "added, normalized": added("<new>", normalized=True),
    "added, special": added("<new>", special=True, lstrip=True),
    "added single_word": added("e", single_word=True),
    "added beyond the vocabulary": added("\u2168"),
    "listed": listed(),
    "listed, added": listed(added("<new>")),
    "listed, but for one": listed(added("<new>"), leave_out=("<new>",)),
    "listed, but for a special one": listed(leave_out=("<mask>", "[MASK]", "</s>")),
    "additional_special_tokens": config(additional_special_tokens=["<new>"]),
    "extra_special_tokens": config(extra_special_tokens=["<new>"]),
    "named extra_special_tokens": config(extra_special_tokens={"new_token": "<new>"}),
}  # fmt: skip


# What a class cannot have, or has otherwise in versions 4 and 5 of transformers.
REFUSED = {
    "GPT2Tokenizer": {change for change in CHANGES if change.startswith("normalizer ")}
    - {"normalizer none"}
    | {"cut none", "cut white space", "model end_of_word_suffix", "model ignore_merges"},
    "GemmaTokenizer": {"add_bos_token", "add_eos_token"},
    "CamembertTokenizer": {"model unk_id", "unk_token", "unk_token null"},
    "XLMRobertaTokenizer": {"model unk_id"},
    "T5Tokenizer": {"model unk_id"},
}
# As version 4 has it: the flags of bos and eos, and how GPT-2's class cuts texts.
_FLAGS = {"add_bos_token", "no add_eos_token"}
OLDER = {
    "GPT2Tokenizer": _FLAGS | {"cut digits", "cut by another pattern"},
    "Qwen2Tokenizer": {"no add_eos_token"},  # It names no bos.
    "LlamaTokenizer": _FLAGS,
}
FEW = (
    ("BertTokenizer", "normalizer steps"), ("BertTokenizer", "cut white space"),
    ("BertTokenizer", "model max_input_chars_per_word"), ("BertTokenizer", "post-processor none"),
    ("BertTokenizer", "model unk_token"), ("BertTokenizer", "cls_token"),
    ("BertTokenizer", "no special tokens named"), ("BertTokenizer", "cls_token null"),
    ("MPNetTokenizer", "model continuing_subword_prefix"), ("RobertaTokenizer", "cut digits"),
    ("RobertaTokenizer", "normalizer NFKC"), ("RobertaTokenizer", "model ignore_merges"),
    ("RobertaTokenizer", "model continuing_subword_prefix"),
    ("RobertaTokenizer", "no add_bos_token"), ("RobertaTokenizer", "listed, but for one"),
    ("GPT2Tokenizer", "normalizer lower"), ("GPT2Tokenizer", "cut digits"),
    ("Qwen2Tokenizer", "model end_of_word_suffix"), ("Qwen2Tokenizer", "mask_token with spaces"),
    ("LlamaTokenizer", "model byte_fallback"), ("GemmaTokenizer", "decoder none"),
    ("Qwen2Tokenizer", "clean_up of BPE"), ("XLMRobertaTokenizer", "model unk_id"),
    ("CamembertTokenizer", "sep_token"), ("T5Tokenizer", "post-processor BERT's"),
)  # fmt: skip


def verdict(directory, name, change):
    """("equal" | "refused" | "peer" | "WRONG", what was seen)."""
    make(directory, name)
    files = [directory / "tokenizer.json", directory / "tokenizer_config.json"]
    tokenizer, settings = (json.loads(file.read_text()) for file in files)
    CHANGES[change](tokenizer, settings)
    for file, values in zip(files, (tokenizer, settings), strict=True):
        file.write_text(json.dumps(values))
    model_type = TYPE.get(name, "bert")

    def seen(made):
        pair, rows = made(*PAIR), made(TEXTS)["input_ids"]
        texts = [made.decode(row, skip_special_tokens=True) for row in rows]
        return [*rows, *texts, pair["input_ids"], pair.get("token_type_ids")]

    try:
        right, failure = seen(AutoTokenizer.from_pretrained(directory)), None
    except BaseException as error:  # A panic of tokenizers is no Exception.
        right, failure = None, f"{type(error).__name__}: {error}"
    try:
        own = read_tokenizer(directory, model_type)
        found = seen(own)
        own.save_pretrained(directory / "export")
        edit(directory / "export" / "config.json", model_type=model_type)
        assert seen(read_tokenizer(directory / "export", model_type)) == found
    except UserError as error:
        return ("refused" if right else "peer"), f"{error} [{failure}]"
    if right is None:
        return "peer", failure
    wrong = [(f, r) for f, r in zip(found, right, strict=True) if f != r]
    return ("WRONG" if wrong else "equal"), str(wrong[:1])


def expected(name, change):
    own = REFUSED.get(name, set()) | {"listed, but for one"}
    pairs = CLASSES[name].model is models.BPE
    own |= {"model continuing_subword_prefix"} if pairs else {"cls_token null"}
    own -= set() if pairs or CLASSES[name].model is models.WordPiece else {"cls_token null"}
    older = change in OLDER.get(name, ())
    return "refused" if change in own else "WRONG" if older else "equal"


def check(directory, name, change):
    found, seen = verdict(directory, name, change)
    assert found in ("peer", expected(name, change)), (name, change, seen)
    return found


@pytest.mark.parametrize(("name", "change"), FEW)
def test_a_class_has_the_ids_of_transformers_whatever_its_file_says(tmp_path, name, change):
    check(tmp_path, name, change)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CLASSES if getattr(transformers, n).__name__ == n])
def test_every_change_of_a_class(tmp_path, name):
    found = []
    for number, change in enumerate(CHANGES):
        (directory := tmp_path / str(number)).mkdir()
        found.append(check(directory, name, change))
    assert found.count("equal") > 0.7 * len(CHANGES)


def test_other_names_of_a_class_are_the_same_here():
    kinds = {}
    for name, own in CLASSES.items():
        assert kinds.setdefault(getattr(transformers, name), own) == own
    assert len(kinds) == 11


def test_a_text_alone_has_one_token_type(tmp_path):
    make(tmp_path, "BertTokenizer")
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="TokenizersBackend")
    file = tmp_path / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = around.TemplateProcessing(single="$A:1", special_tokens=[])
    tokenizer.save(str(file))
    read_tokenizer(tmp_path, "bert")  # They are no input of this class.
    names = ["input_ids", "token_type_ids", "attention_mask"]
    edit(tmp_path / "tokenizer_config.json", model_input_names=names)
    with pytest.raises(UserError, match="post_processor gives a text alone a token type that is n"):
        read_tokenizer(tmp_path, "bert")


def test_a_class_that_is_not_known_is_said(tmp_path, caplog):
    make(tmp_path, "BertTokenizer")
    own = {"AutoTokenizer": ["mine.Tokenizer", None]}
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="FunnelTokenizerFast", auto_map=own)
    read_tokenizer(tmp_path, "bert")
    field, named = caplog.messages
    assert field.endswith("tokenizer_config.json: not known here, and not read: auto_map")
    assert named.endswith("FunnelTokenizer is not known here: tokenizer.json is taken as it is")
