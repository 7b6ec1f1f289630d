"""The tokenizer that a GGUF file describes: byte-level BPE, or SentencePiece's BPE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from expandr_jax.errors import UserError
from expandr_jax.weights.byte_level import PRE_TOKENIZERS, QWEN2, cut_as
from expandr_jax.weights.fields import Fields, one_line, shown
from expandr_jax.weights.tokenizer import between, fast_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Keys that are read here, and those that llama.cpp does not read for these kinds of tokenizer.
_KEYS = (
    "model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id",
    "eos_token_ids", "eot_token_id", "eom_token_id", "unknown_token_id", "padding_token_id",
    "add_bos_token", "add_eos_token", "add_space_prefix",
)  # fmt: skip
_UNREAD = (
    *(f"add_{name}_token" for name in ("cls", "mask", "padding", "sep", "seperator", "unknown")),
    "cls_token_id", "fim_mid_token_id", "fim_pad_token_id", "fim_pre_token_id",
    "fim_rep_token_id", "fim_sep_token_id", "fim_suf_token_id", "mask_token_id", "middle_token_id",
    "precompiled_charsmap", "prefix_token_id", "remove_extra_whitespaces", "seperator_token_id",
    "suffix_token_id", "token_type_count",
)  # fmt: skip
# Tokens that end a chat model's turn, whatever its file calls its eos.
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|eom_id|>")


def read_gguf_tokenizer(metadata: Fields, rows: int) -> PreTrainedTokenizerFast:
    """Builds a tokenizer, chat template included.

    Args:
        metadata: The file's metadata.
        rows: The embedding table's. Special tokens may lie beyond it, such as Gemma's for
            images.

    Returns:
        The tokenizer.

    Raises:
        UserError: If it is of another kind, or damaged.
    """
    own = metadata.under(TOKENIZER_PREFIX)
    kind, split = own.text("model"), own.text("pre", None)
    if kind != "llama" and (kind != "gpt2" or split not in PRE_TOKENIZERS):
        raise UserError(
            f"{metadata.where}: tokenizer {shown(kind)} with pre {shown(split)} is not supported; "
            f"supported: llama, and gpt2 with pre {', '.join(PRE_TOKENIZERS)}"
        )
    own.strict(*_KEYS, *_UNREAD)
    tokens = own.items("tokens", str)
    types = _of_tokens(own, "token_type", int, tokens)
    # As in llama.cpp: converters that took them for words are known.
    types = [CONTROL if t in _ENDS_OF_TURN else n for t, n in zip(tokens, types, strict=True)]
    known = len(tokens)
    while known > rows and types[known - 1] in (CONTROL, USER_DEFINED):
        known -= 1
    try:
        if kind == "llama":
            scores = _of_tokens(own, "scores", float, tokens)
            backend = _sentencepiece(own, tokens[:known], types[:known], scores[:known])
        else:
            backend = _byte_level(own.items("merges", str), tokens[:known], split)
    except UserError:
        raise
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"{metadata.where}: its tokenizer is damaged: {one_line(error)}") from None
    backend.add_tokens(
        [
            AddedToken(token, special=token_type == CONTROL, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in (CONTROL, USER_DEFINED)
        ]
    )
    last = len(tokens) - 1
    special = {
        f"{name}_token": tokens[own.count(f"{field}_token_id", least=0, most=last)]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"{field}_token_id" in own
    }
    ends: dict[str, dict[str, int]] = {"bos": {}, "eos": {}}
    for end, default in (("bos", kind == "llama" or split == "llama-bpe"), ("eos", False)):
        if own.flag(f"add_{end}_token", default):
            index = own.count(f"{end}_token_id", least=0, most=last)
            ends[end] = {tokens[index]: index}
    backend.post_processor = between(**ends)
    architecture = metadata.text("general.architecture")
    return fast_tokenizer(
        backend,
        chat_template=_templates(metadata),
        model_max_length=metadata.count(f"{architecture}.context_length"),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _templates(metadata: Fields) -> str | dict[str, str] | None:
    """A chat template, or several by name."""
    default = metadata.text("tokenizer.chat_template", None)
    others = metadata.items("tokenizer.chat_templates", str, [])
    named = {name: metadata.text(f"tokenizer.chat_template.{name}") for name in others}
    if not named:
        return default
    return named if default is None else {**named, "default": default}


def ends_of_turn(metadata: Fields) -> list[int]:
    """Ids of the tokens that end a chat model's turn, by their keys and by their names."""
    own = metadata.under(TOKENIZER_PREFIX)
    tokens = own.items("tokens", str, [])
    said = [own.count(f"{end}_token_id", None, least=0) for end in ("eot", "eom")]
    # generation_config.json of Qwen's models names this one, SmolLM2's does not.
    ends = (*_ENDS_OF_TURN, *["<|endoftext|>"] * (own.text("pre", None) in QWEN2))
    named = [index for index, token in enumerate(tokens) if token in ends]
    more = own.items("eos_token_ids", int, [])
    return list(dict.fromkeys(end for end in (*said, *more, *named) if end is not None))


def _byte_level(merges: list[str], tokens: list[str], split: str) -> Tokenizer:
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(pair.split(" ")) for pair in merges]
    # Llama 3 keeps some merges that its table of tokens makes unreachable; it skips them too.
    backend = Tokenizer(models.BPE(vocab, pairs, ignore_merges=split == "llama-bpe"))
    cut_as(backend, split)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    own: Fields, tokens: list[str], types: list[int], scores: list[float]
) -> Tokenizer:
    """BPE that merges the pair whose union has the highest score, bytes for what has no piece."""
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, score, token_type in zip(tokens, scores, types, strict=True):
        if token_type in (CONTROL, BYTE):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                merges.append((-score, -len(left), -len(right), vocab[left], left, right))
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    last = len(tokens) - 1
    unknown = tokens[own.count("unknown_token_id", 0, least=0, most=last)]
    backend = Tokenizer(
        models.BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    to_spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = spaces
    if own.flag("add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        to_spaces.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(to_spaces)
    return backend


def _of_tokens(own: Fields, key: str, kind: type, tokens: list[str]) -> list[Any]:
    """A list with a value for each token."""
    values = own.items(key, kind)
    if len(values) != len(tokens):
        raise UserError(
            f"{own.where}: {TOKENIZER_PREFIX}{key} has {len(values)} values for {len(tokens)} "
            "tokens"
        )
    return values
