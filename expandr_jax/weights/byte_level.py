"""How byte-level tokenizers cut text before they merge."""

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = ("qwen2", "deepseek-r1-qwen")
# How text is cut before merging, by tokenizer.ggml.pre; None: as GPT-2 does it.
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3_SPLIT,
    **dict.fromkeys(QWEN2, _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")),
}


def cut_as(backend: Tokenizer, split: str, add_prefix_space: bool = False) -> None:
    """Has a byte-level tokenizer cut texts as one of SPLITS does."""
    cut = [pre_tokenizers.Digits(individual_digits=True)] if split == "smollm" else []
    if SPLITS[split] is not None:
        cut = [pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space, use_regex=SPLITS[split] is None)
    if split in QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
