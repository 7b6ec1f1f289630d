"""How byte-level tokenizers cut text before they merge."""

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = ("qwen2", "deepseek-r1-qwen")
# How text is cut before merging, by tokenizer.ggml.pre; None: as GPT-2 does it.
PRE_TOKENIZERS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3_SPLIT,
    **dict.fromkeys(QWEN2, _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def cut_as(backend: Tokenizer, split: str, add_prefix_space: bool = False) -> None:
    """Has a byte-level tokenizer cut texts as one of PRE_TOKENIZERS does."""
    cut = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    if PRE_TOKENIZERS[split] is not None:
        cut = [pre_tokenizers.Split(Regex(PRE_TOKENIZERS[split]), "isolated")]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=PRE_TOKENIZERS[split] is None)
    if split in QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
