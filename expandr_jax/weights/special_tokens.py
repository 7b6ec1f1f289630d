"""A tokenizer's special tokens, as transformers finds them in its files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from expandr_jax.weights.fields import Fields

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
          "mask_token")  # fmt: skip
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def special_tokens(directory: Path, settings: Fields, backend: Tokenizer) -> dict[str, Any]:
    """Options that a tokenizer is made with, so that it knows tokens which its file may lack.

    Where tokenizer_config.json has no `added_tokens_decoder`, it is of the time when
    special_tokens_map.json and added_tokens.json stood beside it; then the former's fields hold,
    and the latter's tokens are added. Else nobody reads these two.

    Args:
        directory: Holds the files.
        settings: tokenizer_config.json.
        backend: As tokenizer.json has it.
    """
    more = ("extra_special_tokens", "additional_special_tokens")  # One thing's new and old name.
    said = _named(settings)
    extra = next((_tokens(settings, name) for name in more if settings.values.get(name)), None)
    options = {"added_tokens_decoder": _by_id(settings.section("added_tokens_decoder"))}
    if "added_tokens_decoder" not in settings.values:
        beside = Fields.read(directory / "special_tokens_map.json", optional=True)
        said |= _named(beside, special=True)
        if isinstance(beside.values.get(more[0]), dict):
            extra = _tokens(beside, more[0], special=True)
        elif more[0] in beside:
            extra = [*(extra or ()), *_tokens(beside, more[0], special=True)]
        elif extra is None and more[1] in beside:
            extra = _tokens(beside, more[1], special=True)
        known = {str(token) for token in (*said.values(), *(extra or ()))}
        added = Fields.read(directory / "added_tokens.json", optional=True)
        options["added_tokens_decoder"] = {
            **{added.count(name, least=0): _added(name, name in known) for name in added.values},
            **backend.get_added_tokens_decoder(),
        }
    if isinstance(extra, dict):
        options["model_specific_special_tokens"], extra = extra, None
    # A name alone is the token as tokenizer.json has it, with the white space that it takes along.
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = {name: added.get(t, t) if isinstance(t, str) else t for name, t in said.items()}
    return {**named, **options, "extra_special_tokens": extra}


def _named(fields: Fields, **flags: bool) -> dict[str, str | AddedToken | None]:
    """Tokens that have a name each: the usual ones, and a model's own, such as `image_token`."""
    own = [
        name
        for name, value in fields.values.items()
        if name.endswith("_token") and isinstance(value, str | dict) and name not in _NAMED
    ]
    usual = [name for name in _NAMED if name in fields.values]
    return {name: _token(fields, name, **flags) for name in (*usual, *own)}


def _tokens(fields: Fields, name: str, **flags: bool) -> list[Any] | dict[str, Any]:
    """Several tokens: a list of them, or an object with their names."""
    if isinstance(fields.values[name], dict):
        section = fields.section(name)
        return {key: _token(section, key, **flags) for key in section.values if key in section}
    if not isinstance(fields.values[name], list):
        raise fields.refuse(name, "a list of tokens")
    entries = Fields(dict(enumerate(fields.values[name])), fields.where, f"{name}.")
    return [_token(entries, number, **flags) for number in entries.values]


def _token(fields: Fields, name: Any, **flags: bool) -> str | AddedToken | None:
    """A special token: a string, or an object that says how it is cut from a text."""
    if not isinstance(fields.values.get(name), dict):
        return fields.text(name, None)
    token = fields.section(name)
    given = {flag: token.flag(flag, False) for flag in _FLAGS if flag in token}
    return AddedToken(token.text("content"), **{**given, **flags})


def _by_id(given: Fields) -> Mapping[int, str | AddedToken]:
    """Tokens by id, each with its flags, which hold if tokenizer.json has others."""
    if wrong := next((number for number in given.values if not number.isdecimal()), None):
        raise given.refuse(wrong, "tokens by their ids")
    return {int(number): _token(given, number) for number in given.values if number in given}


def _added(content: str, special: bool) -> AddedToken:
    return AddedToken(content, special=special, normalized=not special)
