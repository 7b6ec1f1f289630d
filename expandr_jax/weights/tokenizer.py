"""Tokenizers from a model directory, without transformers' AutoTokenizer, which imports PyTorch."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from expandr_jax.errors import UserError

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_SETTINGS = (
    "model_max_length",
    "model_input_names",
    "padding_side",
    "clean_up_tokenization_spaces",
)


def read_tokenizer(directory: Path, model_type: str | None) -> PreTrainedTokenizerFast:
    """Builds a tokenizer from tokenizer.json and the settings beside it.

    Args:
        directory: Holds tokenizer.json and, optionally, tokenizer_config.json,
            special_tokens_map.json and chat_template.jinja.
        model_type: As in config.json; only BERT takes token types.

    Returns:
        The tokenizer; truncation and padding that the file sets are dropped.

    Raises:
        UserError: If a file is missing or cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; write it with "
            "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{path}: not a readable tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    settings = read_json(directory / "tokenizer_config.json", {})
    special = {**read_json(directory / "special_tokens_map.json", {}), **settings}
    options: dict[str, Any] = {}
    if model_type != "bert":
        options["model_input_names"] = ["input_ids", "attention_mask"]
    options |= {key: settings[key] for key in _SETTINGS if settings.get(key) is not None}
    for key in _SPECIAL_TOKENS:
        if special.get(key) is not None:
            options[key] = _token(special[key])
    template = directory / "chat_template.jinja"
    if template.is_file():
        options["chat_template"] = template.read_text(encoding="utf-8")
    elif settings.get("chat_template"):
        options["chat_template"] = _template(settings["chat_template"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def read_json(path: Path, default: Any = None) -> Any:
    """Parses a JSON file; a missing one gives `default`, or is an error where there is none."""
    if not path.is_file():
        if default is not None:
            return default
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable JSON: {error}") from None


def _token(value: str | dict[str, Any]) -> str | AddedToken:
    if isinstance(value, str):
        return value
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{key: value[key] for key in flags if key in value})


def _template(value: str | list[dict[str, str]]) -> str:
    """A chat template, or the default one of several."""
    if isinstance(value, str):
        return value
    named = {entry["name"]: entry["template"] for entry in value}
    return named.get("default", value[0]["template"])
