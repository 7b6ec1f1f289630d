"""Tokenizer classes of transformers that rebuild a tokenizer.json by the settings beside it.

In its version 5 such a class takes the vocabulary and the merges of the file and has all else from
itself and from tokenizer_config.json; any other class takes the file as it is. So is here, too, a
file of another kind of model than its class has, which cannot be what its model was trained with:
the Unigrams of a multilingual BERT that names no class, say (mteb#5377).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, WhitespaceSplit
from tokenizers.processors import PostProcessor, RobertaProcessing, TemplateProcessing

from expandr_jax.errors import UserError
from expandr_jax.weights.byte_level import QWEN2, cut_as
from expandr_jax.weights.families import BY_TYPE
from expandr_jax.weights.fields import Fields, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_MARK, _BYTE = "\u2581", "\u0120"  # A space as SentencePiece writes it, and as a byte.
# How SentencePiece's pairs become text.
_TEXT = [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
_AS_IT_IS = ("", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a class makes a tokenizer of.

    Attributes:
        backend: tokenizer.json, which is changed.
        settings: tokenizer_config.json.
        unknown: The name of the unknown token.
        where: tokenizer.json's path, for messages.
    """

    backend: Tokenizer
    settings: Fields
    unknown: str
    where: str

    def set(self, **options: Any) -> None:
        """Gives the model these options."""
        model = self.backend.model
        for name, value in options.items():
            if getattr(model, name) != value:
                setattr(model, name, value)

    def refuse(self, what: str, otherwise: str) -> UserError:
        return UserError(
            f"{self.where}: {what} is not supported with this tokenizer_class, which has "
            f"{otherwise}; PreTrainedTokenizerFast takes the file as it is"
        )


def _bert(parts: _Parts) -> None:
    settings, backend = parts.settings, parts.backend
    if backend.model.token_to_id(parts.unknown) is None:
        raise UserError(
            f"{parts.where}: its vocabulary lacks the token of unknown words, "
            f"{shown(parts.unknown)}: name its own by unk_token in tokenizer_config.json"
        )
    parts.set(unk_token=parts.unknown, continuing_subword_prefix="##", max_input_chars_per_word=100)
    backend.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.flag("tokenize_chinese_chars", True),
        strip_accents=settings.flag("strip_accents", None),
        lowercase=settings.flag("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")


def _pairs(parts: _Parts, pieces: bool, unknown: str | None = None) -> None:
    """Options of BPE, of bytes or of SentencePiece's pieces."""
    if parts.backend.model.continuing_subword_prefix:  # The merges were read with it.
        raise parts.refuse("model.continuing_subword_prefix", "none")
    parts.set(
        unk_token=unknown, end_of_word_suffix=None, ignore_merges=False, fuse_unk=pieces,
        byte_fallback=pieces,
    )  # fmt: skip


def _roberta(parts: _Parts) -> None:
    _pairs(parts, pieces=False)
    parts.backend.normalizer = None
    parts.backend.pre_tokenizer = ByteLevel(parts.settings.flag("add_prefix_space", False))
    parts.backend.decoder = decoders.ByteLevel()


def _gpt2(parts: _Parts) -> None:
    """Keeps the file's cut, where version 5 has another than models were trained with."""
    model, cut = parts.backend.model, parts.backend.pre_tokenizer
    for name, value in {
        "normalizer": parts.backend.normalizer is not None,
        "model.continuing_subword_prefix": model.continuing_subword_prefix,
        "model.end_of_word_suffix": model.end_of_word_suffix,
        "model.ignore_merges": model.ignore_merges,
    }.items():
        if value:
            raise parts.refuse(name, "none in version 5 of transformers")
    if cut is None or b'"ByteLevel"' not in cut.__getstate__():
        raise parts.refuse("pre_tokenizer", "ByteLevel")
    if isinstance(cut, ByteLevel):
        cut.add_prefix_space = parts.settings.flag("add_prefix_space", False)
        parts.backend.pre_tokenizer = cut
    parts.backend.decoder = decoders.ByteLevel()


def _qwen2(parts: _Parts) -> None:
    _pairs(parts, pieces=False)
    cut_as(parts.backend, QWEN2[0], parts.settings.flag("add_prefix_space", False))
    parts.backend.decoder = decoders.ByteLevel()


def _gemma(parts: _Parts) -> None:
    _pairs(parts, pieces=True, unknown=parts.unknown)
    parts.backend.normalizer = normalizers.Replace(" ", _MARK)
    parts.backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    parts.backend.decoder = decoders.Sequence([*_TEXT])


def _llama(parts: _Parts) -> None:
    _pairs(parts, pieces=True)
    flag = parts.settings.flag
    prefix, legacy = flag("add_prefix_space", True), flag("legacy", False)
    scheme = ("always" if legacy else "first") if prefix else "never"
    parts.backend.normalizer = None
    parts.backend.pre_tokenizer = Metaspace(prepend_scheme=scheme, split=False)
    parts.backend.decoder = decoders.Sequence(_TEXT + [decoders.Strip(" ", left=1)] * prefix)


def _unigrams(parts: _Parts, unknown: int | None, prefix: bool) -> None:
    backend = parts.backend
    try:
        (found,) = {token.id for token in backend.model.tokenize("\U0010ffff")}
    except Exception:  # tokenizers raises nothing narrower; or these are bytes.
        found = None
    if found != unknown:
        raise parts.refuse(f"model.unk_id {shown(found)}", shown(unknown))
    own = backend.normalizer
    steps = [*own] if isinstance(own, normalizers.Sequence) else [own]
    letters = [step for step in steps if isinstance(step, normalizers.Precompiled)]
    backend.normalizer = letters[0] if letters else None
    scheme = "always" if prefix else "never"
    marks = Metaspace(prepend_scheme=scheme)
    backend.pre_tokenizer = pre_tokenizers.Sequence([WhitespaceSplit(), marks])
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)


def _xlm_roberta(parts: _Parts) -> None:
    _unigrams(parts, 3, parts.settings.flag("add_prefix_space", True))


def _camembert(parts: _Parts) -> None:
    known = parts.backend.model.token_to_id(parts.unknown) or 0
    _unigrams(parts, known, parts.settings.flag("add_prefix_space", True))


def _t5(parts: _Parts) -> None:
    _unigrams(parts, 2, True)


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """A class that makes a tokenizer anew.

    Attributes:
        model: The kind of model that it has, a class of `tokenizers.models`.
        make: Makes all of tokenizer.json anew but the vocabulary and what stands around texts.
        special: Special tokens that no file names, if they are in the vocabulary.
        ends: What puts special tokens around texts: "sep" and "sep-sep" cls and sep, one or two of
            it between the texts of a pair; "bos-eos" bos and eos; "eos" eos alone; "" the file.
        marked: Whether a space is written as by SentencePiece, or as a byte; None: no matter.
        has_types: Whether a pair's second text has token types of its own.
        bare: Whether its special tokens take no white space along, whatever a file says.
    """

    model: type[models.Model]
    make: Callable[[_Parts], None]
    special: Mapping[str, str]
    ends: str = ""
    marked: bool | None = None
    has_types: bool = False
    bare: bool = False

    def fits(self, backend: Tokenizer) -> bool:
        """Whether a tokenizer.json is of this class's kind."""
        own, other = (_MARK, _BYTE) if self.marked else (_BYTE, _MARK)
        known = backend.model.token_to_id
        its_own = self.marked is None or known(own) is not None or known(other) is None
        return isinstance(backend.model, self.model) and its_own

    def make_anew(self, backend: Tokenizer, settings: Fields, unknown: Any, where: str) -> None:
        """Makes of tokenizer.json what the class makes of it, before it has cut any text.

        Args:
            backend: As tokenizer.json has it.
            settings: tokenizer_config.json.
            unknown: The unknown token; None if there is none.
            where: tokenizer.json's path, for messages.

        Raises:
            UserError: If the class has something otherwise than can be made here.
        """
        self.make(_Parts(backend, settings, str(unknown), where))

    def post_processor(
        self, tokenizer: PreTrainedTokenizerFast, where: str
    ) -> PostProcessor | None:
        """What puts special tokens around texts; None: as tokenizer.json has it.

        Raises:
            UserError: If a token that it takes is not named.
        """
        if not self.ends:
            return None
        names = ("cls", "sep") if self.ends in ("sep", "sep-sep") else ("bos", "eos")
        names = names[self.ends == "eos" :]
        tokens = [getattr(tokenizer, f"{name}_token") for name in names]
        if None in tokens:
            raise UserError(
                f"{where}: {names[tokens.index(None)]}_token is missing, which this "
                "tokenizer_class puts around each text"
            )
        ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
        *first, last = tokens
        if self.ends == "sep-sep":
            return RobertaProcessing((last, ids[last]), (first[0], ids[first[0]]))
        single = [*first, "$A", last]
        if self.ends == "sep":
            pair = [*single, "$B:1", f"{last}:1"]
        else:
            pair = [*single, *([last] if first else []), "$B", last]
        return TemplateProcessing(single=single, pair=pair, special_tokens=[*ids.items()])


_BERT_S = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
_LLAMA_S = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_ROBERTA_S = {
    **_LLAMA_S, "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>",
    "mask_token": "<mask>",
}  # fmt: skip
_GEMMA_S = {f"{name}_token": f"<{name}>" for name in ("unk", "bos", "eos", "pad", "mask")}
_T5_S = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_GPT2_S = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "<|endoftext|>")
_QWEN2_S = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_MPNET_S = {**_ROBERTA_S, "unk_token": "[UNK]"}
_WORDS = TokenizerClass(models.WordPiece, _bert, _BERT_S, "sep")
_XLM = TokenizerClass(models.Unigram, _xlm_roberta, _ROBERTA_S, "bos-eos")
_BERTS = ("Bert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
_ROBERTAS = ("Roberta", "Bart", "LED", "Longformer", "Mvp")
_ROBERTA = TokenizerClass(models.BPE, _roberta, _ROBERTA_S, "sep-sep", marked=False)
CLASSES = {
    **{f"{name}Tokenizer": dataclasses.replace(_WORDS, has_types=True) for name in _BERTS},
    **{f"{name}Tokenizer": _ROBERTA for name in _ROBERTAS},
    "DistilBertTokenizer": _WORDS,
    "MPNetTokenizer": TokenizerClass(models.WordPiece, _bert, _MPNET_S, "sep-sep"),
    "GPT2Tokenizer": TokenizerClass(models.BPE, _gpt2, _GPT2_S, marked=False),
    "Qwen2Tokenizer": TokenizerClass(models.BPE, _qwen2, _QWEN2_S, marked=False, bare=True),
    "GemmaTokenizer": TokenizerClass(models.BPE, _gemma, _GEMMA_S, marked=True),
    "LlamaTokenizer": TokenizerClass(models.BPE, _llama, _LLAMA_S, marked=True),
    "XLMRobertaTokenizer": _XLM,
    "CamembertTokenizer": dataclasses.replace(_XLM, make=_camembert),
    "T5Tokenizer": TokenizerClass(models.Unigram, _t5, _T5_S, "eos"),
}


def class_name(kind: str, model_type: str | None, backend: Tokenizer) -> str:
    """Which class it is, "" for none: the one that is named, without Fast, else the family's.

    Llama 3 and others have the name of Llama's and characters for bytes, which version 5 sees.
    """
    family = BY_TYPE.get(model_type)
    misnamed, usual = (family.misnamed, family.tokenizer_classes) if family else ((), {})
    named = "" if model_type in misnamed else kind.removesuffix("Fast")
    name = named or usual.get(model_type, "")
    if name == "LlamaTokenizer":
        parts = written_parts(backend, backend.normalizer, backend.post_processor)
        return "" if b'"ByteLevel"' in parts else name
    return name


def is_known(name: str) -> bool:
    """Whether it is known what a class makes of tokenizer.json."""
    return name in CLASSES or name in _AS_IT_IS


def written_parts(backend: Tokenizer, *more: Any) -> bytes:
    """What tokenizer.json says of how text is cut, of how tokens become text, and of `more`."""
    parts = backend.pre_tokenizer, backend.decoder, *more
    return b"".join(part.__getstate__() for part in parts if part is not None)
