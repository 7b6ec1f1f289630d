"""Hashes of what a model's outputs depend on beside its parameters, for keys of kept files."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from expandr_jax.files.records import hash_json

# Words, cases, accents, digits, spaces, lines, another script: what tokenizers treat differently.
PROBE_TEXTS = ("Naïve CAFÉ  state-of-the-art", "x = 3.14159 # 1,000\n\treturn", "検索 поиск 🔍", "")
_WORDS = 1000  # Words of a vocabulary, by which a tokenizer is told from others.


def hash_tokenizer(tokenizer: Any) -> str:
    """sha256 over its vocabulary, what it makes of some texts, and its chat template."""
    ids = [[int(i) for i in tokenizer([text])["input_ids"][0]] for text in PROBE_TEXTS]
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    template = getattr(tokenizer, "chat_template", None)
    return hash_json([sorted(vocabulary.items()), ids, template])


def tokenizer_identity(tokenizer: Any) -> str:
    """`hash_tokenizer`, and what it makes of its own words, however they are written.

    It is by what the tokenizer does, since libraries write down the same one in different ways; or
    by its `identity`, if it has one.
    """
    if hasattr(tokenizer, "identity"):
        return hash_json([hash_tokenizer(tokenizer), tokenizer.identity])
    words = sorted(tokenizer.get_vocab())
    words = words[:: max(1, len(words) // _WORDS)]
    plain = " ".join(words)
    accented = "".join(f"{letter}\u0301" for letter in plain)
    texts = plain, plain.upper(), plain.title(), accented, "".join(words), " \t\n".join(words)
    ids = [[int(i) for i in tokenizer([text])["input_ids"][0]] for text in texts]
    side = getattr(tokenizer, "truncation_side", "")
    return hash_json([hash_tokenizer(tokenizer), ids, side])


def module_identity(module: nn.Module) -> list[Any]:
    """What a module computes with parameters depends on, as JSON: its class, options and type.

    Options that have their defaults are left out, so that one which comes to be changes nothing.
    """
    config = module.config
    options = {
        field.name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    if options.get("quantized") == "int8":  # So it was written before there were others.
        del options["quantized"]
        options["int8"] = True
    return [type(module).__name__, options, jnp.dtype(module.dtype).name]
