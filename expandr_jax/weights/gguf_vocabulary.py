"""A tokenizer as GGUF's metadata, which `gguf_tokenizer` reads: it is read back before it is kept.

What is written must cut texts as llama.cpp knows to: a tokenizer of another kind is refused.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, models

from expandr_jax.errors import UserError, shown
from expandr_jax.models.generator import Generator
from expandr_jax.weights.byte_level import PRE_TOKENIZERS, cut_as
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    TOKENIZER_PREFIX,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    read_gguf_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Texts on which tokenizers differ: digits, spaces, lines, contractions, scripts, compositions.
_PROBES = (
    "",
    "Hello world",
    "  two  spaces   and a tab\t\tthen\n\n\nlines \r\n x\r\ry ",
    "1 22 333 4444 55555 3.14159 2x4y8z \u00bd \u0663\u0664",
    "It's we'll THEY'VE I'M don't you'd 'tis ''s",
    "na\u00efve e\u0301 \u212b \ufb01 \uac00\u1100\u1161 stra\u00dfe",
    "\u6771\u4eac\u90fd \u041c\u043e\u0441\u043a\u0432\u0430 \u0627\u0644\u0639 \u0939\u093f\u0928 "
    "\u0e44\u0e17\u0e22",
    "\U0001f642\U0001f642 \U0001f469\u200d\U0001f680 \u2581 \u00a0 \u3000 \u200b",
    "def f(x):\n    return {'a': [1,2], \"b\": x**2}  # !?...--==>>",
    "a" * 40 + " " * 17 + "." * 9,
    "user\nassistant\nsystem",
)
_LEAST_SCORE = -1e6  # Below that of any merge: a token that none makes.
_SAMPLED = 400  # Tokens of the vocabulary that are looked at as texts.


def vocabulary(generator: Generator, architecture: str) -> dict[str, Any]:
    """The metadata of a generator's tokenizer and chat template.

    Args:
        generator: Whose embedding table the tokens are for, a token a row.
        architecture: llama.cpp's name of it.

    Returns:
        Values by key.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    tokenizer = generator.tokenizer
    backend = _backend(tokenizer)
    state = json.loads(backend.to_str())
    rows = generator.module.config.vocab_size
    pieces = "llama" if state["model"].get("byte_fallback") else "gpt2"
    tokens, types = _tokens(backend, state, rows)
    metadata = {
        "general.architecture": architecture,
        f"{architecture}.context_length": generator.module.config.max_positions,
        **_under_prefix(
            model=pieces,
            tokens=tokens,
            token_type=types,
            **_special(generator, rows),
            **_ends(tokenizer),
        ),
        **_templates(tokenizer),
    }
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in _merges(state)]
    probes = [*_PROBES, *_of_vocabulary(tokenizer, tokens, types)]
    if pieces == "gpt2":
        written = [" ".join(pair) for pair in merges]
        tries = [{"pre": name, "merges": written} for name in _cuts(backend)]
    else:
        scores = _scores(tokens, merges)
        tries = [{"pre": "default", "scores": scores, "add_space_prefix": x} for x in (True, False)]
    for own in tries:
        tried = metadata | _under_prefix(**own)
        if _same(tokenizer, read_gguf_tokenizer(Fields(tried, "the tokenizer"), rows), probes):
            return tried
    raise UserError(
        "its tokenizer cuts texts otherwise than llama.cpp can be told to, which knows "
        f"SentencePiece's BPE and byte-level BPE as of {', '.join(PRE_TOKENIZERS)}"
    )


def _backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.BPE):
        kind = type(getattr(backend, "model", tokenizer)).__name__
        raise UserError(f"its tokenizer is {shown(kind)}; a GGUF file is written of BPE alone")
    return backend


def _merges(state: Mapping[str, Any]) -> Sequence[Any]:
    merges = state["model"]["merges"]
    if not merges:
        raise UserError("its tokenizer has no merges, without which llama.cpp loads none")
    return merges


def _under_prefix(**values: Any) -> dict[str, Any]:
    return {f"{TOKENIZER_PREFIX}{name}": value for name, value in values.items()}


def _tokens(backend: Tokenizer, state: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row of the embeddings."""
    by_id = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    added = {token["id"]: token for token in state["added_tokens"]}
    beyond = [token for index, token in by_id.items() if index >= rows and index not in added]
    if beyond:
        raise UserError(f"token {shown(beyond[0])} has no row in its table of {rows} embeddings")
    unknown = state["model"].get("unk_token")

    def kind(index: int) -> int:
        token = by_id[index]
        if index in added:
            return CONTROL if added[index]["special"] else USER_DEFINED
        if state["model"].get("byte_fallback"):
            if token == unknown:
                return UNKNOWN
            if len(token) == 6 and token.startswith("<0x"):
                return BYTE
        return NORMAL

    # Rows without a token, which many tables have to be of a round size, get names of their own.
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(rows)]
    types = [kind(index) if index in by_id else UNUSED for index in range(rows)]
    return tokens, types


def _special(generator: Generator, rows: int) -> dict[str, Any]:
    """Ids of special tokens, those that end a text among them."""
    tokenizer = generator.tokenizer
    eos = generator.eos_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    bos = tokenizer.bos_token_id
    if bos is None:
        # llama.cpp would take its 11th token for one.
        bos = generator.files.config.values.get("bos_token_id")
    ids = {
        "bos": bos,
        "eos": eos,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    others = [end for end in generator.eos_ids if end != eos]
    if others:
        ids["eot"] = generator.end_id if generator.end_id in others else others[0]
    found = {f"{name}_token_id": i for name, i in ids.items() if i is not None and i < rows}
    return found | ({"eos_token_ids": list(generator.eos_ids)} if len(others) > 1 else {})


def _ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """Whether texts begin with bos and end with eos."""
    plain, whole = (tokenizer("a", add_special_tokens=x)["input_ids"] for x in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for begins, ends in itertools.product((False, True), repeat=2):
        if whole == [*[bos] * begins, *plain, *[eos] * ends]:
            return {"add_bos_token": begins, "add_eos_token": ends}
    raise UserError(f"its tokenizer makes {whole} of 'a'; llama.cpp puts bos and eos alone around")


def _templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """A chat template, or several by name."""
    given = tokenizer.chat_template
    named = {"default": given} if isinstance(given, str) else dict(given or {})
    found = {"tokenizer.chat_template": named.pop("default")} if "default" in named else {}
    if named:
        found["tokenizer.chat_templates"] = list(named)
    return found | {f"tokenizer.chat_template.{name}": text for name, text in named.items()}


def _cuts(backend: Tokenizer) -> Iterator[str]:
    """Names of those PRE_TOKENIZERS that cut the probes as a tokenizer does before it merges."""

    def cut(of: Tokenizer) -> list[list[str]]:
        texts = [of.normalizer.normalize_str(x) if of.normalizer else x for x in _PROBES]
        pre = of.pre_tokenizer
        return [[x for x, _ in pre.pre_tokenize_str(text)] if pre else [text] for text in texts]

    expected = cut(backend)
    for name in PRE_TOKENIZERS:
        twin = Tokenizer(models.BPE())
        cut_as(twin, name)
        if cut(twin) == expected:
            yield name


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores, by which a higher one is merged first: the order of the merges."""
    order: dict[str, float] = {}
    for left, right in merges:
        order.setdefault(left + right, -float(len(order)))
    return [order.get(token, _LEAST_SCORE) for token in tokens]


def _of_vocabulary(
    tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str], types: Sequence[int]
) -> Iterator[str]:
    """Texts made of the vocabulary: some tokens of it, and all that are added."""
    normal = [index for index, kind in enumerate(types) if kind == NORMAL]
    some = normal[:: max(1, len(normal) // _SAMPLED)]
    yield tokenizer.decode(some)
    yield " ".join(tokenizer.decode([index]) for index in some)
    added = [t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER_DEFINED)]
    yield "".join(f"x{token}y {token} z\n{token}" for token in added)


def _same(ours: Any, theirs: PreTrainedTokenizerFast, texts: Sequence[str]) -> bool:
    """Whether two tokenizers give the same ids, with special tokens around."""
    found, expected = (of(list(texts))["input_ids"] for of in (ours, theirs))
    return found == expected
