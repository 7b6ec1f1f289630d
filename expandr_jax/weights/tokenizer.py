"""Tokenizers from a model directory, without transformers' AutoTokenizer, which imports PyTorch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from expandr_jax.errors import UserError
from expandr_jax.weights.fields import Fields, model_max_length, one_line, read_text, shown
from expandr_jax.weights.special_tokens import special_tokens
from expandr_jax.weights.tokenizer_classes import (
    CLASSES,
    class_name,
    is_known,
    written_parts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)
ANY_LENGTH = 2**31 - 1  # A text that no file limits; files and transformers have 1e30.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Fields of tokenizer_config.json that are obeyed here, and those that change no ids.
_KNOWN = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder",
    "additional_special_tokens", "chat_template", "clean_up_tokenization_spaces", "do_lower_case",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "extra_special_tokens", "fix_mistral_regex", "legacy", "max_len", "model_input_names",
    "model_max_length", "padding_side", "split_special_tokens", "strip_accents",
    "tokenize_chinese_chars", "tokenizer_class", "truncation_side",
)  # fmt: skip
_UNREAD = (
    "backend", "chat_control_tokens", "do_basic_tokenize", "errors", "extra_ids",
    "from_slow", "is_local", "local_files_only", "max_length", "name_or_path",
    "never_split", "pad_to_multiple_of", "pad_token_type_id", "processor_class", "response_schema",
    "response_template", "sp_model_kwargs", "spaces_between_special_tokens",
    "special_tokens_map_file", "stride", "tokenizer_file", "trim_offsets", "truncation_strategy",
    "use_default_system_prompt", "use_fast", "vocab_file", "wordpieces_prefix",
)  # fmt: skip
_ODD_TEXT = "a \U0010ffff"  # Its last character is in no vocabulary.
# Mistral's mended pattern tells cases apart; it is of tokenizers with more tokens than these.
_MISTRAL_CUT, _MISTRAL_TOKENS = rb"\\p{Lu}\\p{Lt}", 100_000
_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"  # transformers' name for it.


def read_tokenizer(directory: Path, model_type: str | None) -> PreTrainedTokenizerFast:
    """Builds a tokenizer from tokenizer.json and the settings beside it.

    Args:
        directory: Holds tokenizer.json and, optionally, tokenizer_config.json,
            special_tokens_map.json, added_tokens.json and chat_template.jinja.
        model_type: As in config.json.

    Returns:
        The tokenizer; lengths of truncation and padding that the file sets are dropped.

    Raises:
        UserError: If a file is missing or cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; write it with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    with _readable(path):
        backend = Tokenizer.from_file(str(path))
    if dropout := getattr(backend.model, "dropout", None):
        raise UserError(
            f"{path}: model.dropout={dropout:g} is not supported: it cuts a text otherwise each "
            "time; null cuts it as the merges say"
        )
    side = (backend.truncation or {}).get("direction", "right").lower()
    backend.no_truncation()
    backend.no_padding()
    settings = Fields.read(directory / "tokenizer_config.json", optional=True)
    unknown = {n for n in settings.values if n in settings and not n.endswith("_token")}
    if unknown := sorted(unknown - {*_KNOWN, *_UNREAD}):
        logger.warning("%s: not known here, and not read: %s", settings.where, ", ".join(unknown))
    mended = _MISTRAL_CUT in written_parts(backend) or backend.get_vocab_size() <= _MISTRAL_TOKENS
    if settings.flag("fix_mistral_regex", False) and not mended:
        raise UserError(
            f"{settings.where}: fix_mistral_regex=True is not supported; transformers mends "
            "tokenizer.json by it: load and save the tokenizer there"
        )
    config = Fields.read(directory / "config.json", optional=True)
    kind = settings.text("tokenizer_class", None) or config.text("tokenizer_class", "")
    name = class_name(kind, model_type, backend)
    if not is_known(name):
        logger.warning(
            "%s: tokenizer_class %s is not known here: tokenizer.json is taken as it is",
            settings.where, name,
        )  # fmt: skip
    own = CLASSES.get(name)
    types = ["token_type_ids"] if own is not None and own.has_types else []
    own = own if own is not None and own.fits(backend) else None
    special = special_tokens(directory, settings, backend)
    if own is not None:
        known = {n: t for n, t in own.special.items() if backend.token_to_id(t) is not None}
        special = {**known, **special}
        own.make_anew(backend, settings, special.get("unk_token"), str(path))
    with _readable(path):
        backend.encode(_ODD_TEXT)
    inputs = ["input_ids", *types, "attention_mask"]
    options = {
        "model_max_length": model_max_length(settings),
        "model_input_names": settings.items("model_input_names", str, inputs),
        "padding_side": settings.choice("padding_side", ("left", "right"), None),
        "truncation_side": settings.choice("truncation_side", ("left", "right"), side),
        **{name: settings.flag(name, None) for name in _KNOWN if name.startswith("clean_up_")},
        "split_special_tokens": settings.flag("split_special_tokens", None),
        **special,
    }
    options["chat_template"] = _templates(directory, settings)
    options = {name: value for name, value in options.items() if value is not None}
    tokenizer = fast_tokenizer(backend, **options)
    if own is not None and "added_tokens_decoder" in settings.values:
        kept = {*map(str, special["added_tokens_decoder"].values()), *tokenizer.all_special_tokens}
        _refuse_lost(backend, kept, settings.where)
    if own is not None and own.bare:
        tokenizer.add_tokens([AddedToken(t, special=True) for t in tokenizer.all_special_tokens])
    if own is not None and own.ends:
        ends = own.post_processor(tokenizer, settings.where)
        tokenizer.backend_tokenizer.post_processor = ends
    else:
        _add_ends(tokenizer, settings)
    if any(tokenizer("a").get("token_type_ids", ())):  # Retrievers have none but 0.
        raise UserError(f"{path}: post_processor gives a text alone a token type that is not 0")
    return tokenizer


def fast_tokenizer(backend: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """transformers' tokenizer of these parts.

    It does not warn of texts beyond its model's length: whoever encodes such a text cuts it, and
    says so where that matters.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.deprecation_warnings[_TOO_LONG] = True  # As if it had been said.
    return tokenizer


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """UserError, naming tokenizer.json, for whatever tokenizers raises of it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # A panic of the library is no Exception.
        raise UserError(f"{path}: not a readable tokenizer: {one_line(error)}") from None


def _refuse_lost(backend: Tokenizer, kept: Container[str], where: str) -> None:
    """Refuses tokens that tokenizer.json adds and a class that makes it anew would not."""
    for token in backend.get_added_tokens_decoder().values():
        if token.content not in kept:
            raise UserError(
                f"{where}: added_tokens_decoder lacks {shown(token.content)}, which tokenizer.json "
                "adds and this tokenizer_class would leave out: name it in both"
            )


def _add_ends(tokenizer: PreTrainedTokenizerFast, settings: Fields) -> None:
    """Sets bos before each text and eos behind it, or neither, as the flags in the settings say.

    tokenizer.json says the same by its post-processor; where they differ the flags hold, as in
    version 4 of transformers. Version 5 does not read them.
    """
    ids = tokenizer("a")["input_ids"]
    tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    has = {"bos": ids[:1] == [tokens["bos"]], "eos": ids[-1:] == [tokens["eos"]]}
    wanted = {
        end: settings.flag(f"add_{end}_token", has[end]) and tokens[end] is not None
        for end in tokens
    }
    if wanted == has:
        return
    if tokenizer.num_special_tokens_to_add() != sum(has.values()):
        end = next(end for end in has if has[end] != wanted[end])
        raise UserError(
            f"{settings.where}: add_{end}_token is {shown(wanted[end])}, but tokenizer.json says "
            "otherwise and adds other tokens, too: make them agree"
        )
    names = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    special = ({names[end]: tokens[end]} if wanted[end] else {} for end in tokens)
    tokenizer.backend_tokenizer.post_processor = between(*special)


def end_texts(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Puts the end token behind each text; UserError, naming the file, where that cannot be."""
    if not hasattr(tokenizer, "backend_tokenizer") or tokenizer.eos_token_id is None:
        raise UserError(f"{where}: retriever.end_token is set, but no eos token is named here")
    _add_ends(tokenizer, Fields({"add_eos_token": True}, where))


def between(bos: Mapping[str, int], eos: Mapping[str, int]) -> TemplateProcessing:
    """Puts special tokens, by their ids, before each text and behind it."""
    return TemplateProcessing(
        single=[*bos, "$A:0", *eos],
        pair=[*bos, "$A:0", *eos, *(f"{end}:1" for end in bos), "$B:1", *(f"{e}:1" for e in eos)],
        special_tokens=[*bos.items(), *eos.items()],
    )


def _templates(directory: Path, settings: Fields) -> str | dict[str, str] | None:
    """A chat template, or several by name: of files of their own, else of the settings."""
    files = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    named = {path.stem: read_text(path) for path in files}
    if (own := directory / "chat_template.jinja").exists():
        named["default"] = read_text(own)
    if not named:
        if not isinstance(settings.values.get("chat_template"), list):
            return settings.text("chat_template", None) or None
        for entry in settings.items("chat_template", dict):
            field = Fields(entry, settings.where, "chat_template.")
            name, text = field.text("name"), field.text("template")
            if Path(name).name != name:  # An export writes a file of this name.
                raise field.refuse("name", "a file's name")
            named[name] = text
    return named["default"] if named.keys() == {"default"} else named or None
