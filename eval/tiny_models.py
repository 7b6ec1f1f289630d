"""Tiny random PyTorch models of every stock family, written by transformers, to compare with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

VOCAB = 96
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ROBERTA = {**_SHAPE, "pad_token_id": 1, "type_vocab_size": 1}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "pad_token_id": 0,
}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_MODERN = {
    **_SHAPE,
    **_ENDS,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "num_hidden_layers": 4,
    "global_attn_every_n_layers": 2,
}
_GROUPED = {**_SHAPE, **_ENDS, "num_key_value_heads": 2}
_GEMMA = {
    **_GROUPED,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 5,
    "layer_types": ["sliding_attention"] * 2 + ["full_attention"],
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def linear_rope(full: float, sliding: float) -> dict[str, dict[str, Any]]:
    """Rope parameters of two bases; positions are an eighth of what they are in full attention."""
    return {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": full},
        "sliding_attention": {"rope_type": "default", "rope_theta": sliding},
    }


_BIASED = {
    **_MODERN,
    **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias"), True),
    "local_attention": 4,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"],
    "rope_parameters": linear_rope(1e5, 5e3),
}
_SCALED = {**_GROUPED, "rope_theta": 5e5, "rope_scaling": _LLAMA3}
_STRETCHED = {**_GROUPED, "head_dim": 16, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
_WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# transformers' name of the family, and what its config has.
_FAMILIES = {
    "bert": ("Bert", _SHAPE),
    "camembert": ("Camembert", _ROBERTA),
    "roberta": ("Roberta", _ROBERTA),
    "xlm-roberta": ("XLMRoberta", _ROBERTA),
    # Layers of both kinds, and windows that lie within the rows.
    "modernbert": ("ModernBert", {**_MODERN, "local_attention": 9}),
    "modernbert-biases": ("ModernBert", _BIASED),
    "t5": ("T5", _T5),
    "t5-gated": ("T5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "llama": ("Llama", {**_GROUPED, "tie_word_embeddings": False, "rope_theta": 5e5}),
    "llama-3.1": ("Llama", _SCALED),
    "llama-3.2": ("Llama", {**_SCALED, "tie_word_embeddings": True}),
    "llama-linear": ("Llama", _STRETCHED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": None, "head_dim": 16}),
    "mistral-window": ("Mistral", {**_GROUPED, "sliding_window": 5}),
    "qwen2": ("Qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {**_GROUPED, **_WINDOW}),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma3": ("Gemma3Text", _GEMMA),
    "gemma3-linear": ("Gemma3Text", {**_GEMMA, "rope_parameters": linear_rope(1e6, 1e4)}),
}
ENCODERS = (
    *("bert", "camembert", "roberta", "xlm-roberta"),
    *("modernbert", "modernbert-biases", "t5", "t5-gated"),
)
DECODERS = tuple(name for name in _FAMILIES if name not in ENCODERS)

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def torch_model(family: str, *, head: bool = False, **changes: Any) -> torch.nn.Module:
    """A random model of ENCODERS or DECODERS in evaluation mode; biases and norms are random too.

    `head`: whether it has logits, and not hidden states; `changes` are of the family's config.
    """
    kind, options = _FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**options, **changes})
    if kind == "Gemma3Text" and head:
        cls = transformers.Gemma3ForCausalLM
    elif kind == "T5":
        cls = transformers.T5ForConditionalGeneration if head else transformers.T5EncoderModel
    else:
        cls = getattr(transformers, f"{kind}{'ForCausalLM' if head else 'Model'}")
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def ragged_batch(side: str, lengths=(17, 9, 1)) -> tuple[np.ndarray, np.ndarray]:
    """Random ids and their mask, padded on one side with an id that is not special."""
    rng = np.random.default_rng(0)
    ids = np.full((len(lengths), max(lengths)), 7)
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[row, place] = rng.integers(8, VOCAB, length)
        mask[row, place] = 1
    return ids, mask


def unpadded(values: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """The values at real tokens, a row at a time."""
    return [row[keep > 0] for row, keep in zip(np.asarray(values), np.asarray(mask), strict=True)]


def save_random(directory: Path, family: str, kind: type, **changes: Any) -> torch.nn.Module:
    """Writes a random model of a family, as a kind of transformers' makes it, with a tokenizer."""
    config = torch_model(family).config
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(1)
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    save_tokenizer(directory, chat=False, pad_id=config.pad_token_id)
    return model


def save_tokenizer(directory: Path, *, chat: bool, pad_id: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of single letters, with special tokens, and a template for chat."""
    special = ["<s>", "</s>", "<unk>"]
    special.insert(pad_id, "<pad>")
    letters = [chr(c) for c in range(ord("!"), ord("~"))][: VOCAB - 5]
    vocab = {token: i for i, token in enumerate([*special, "Ġ", *letters])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    if not chat:
        backend.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", vocab["<s>"]), ("</s>", 2)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=64,
        chat_template=TEMPLATE if chat else None,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def save(directory: Path, family: str, *, head: bool = False, **changes: Any) -> torch.nn.Module:
    """Writes a random model and a tokenizer as transformers does; arguments as there."""
    model = torch_model(family, head=head, **changes)
    model.save_pretrained(directory)
    save_tokenizer(directory, chat=head, pad_id=model.config.pad_token_id)
    return model


# Sentence encoders as they are published, of other shapes: the family and what its config has
# beside, pooling, widths of the Dense modules after it, prompts of queries and documents.
SENTENCES: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...], dict[str, str]]] = {
    "e5": ("bert", {}, "mean", (), {"query": "query: ", "document": "passage: "}),
    "xlm-e5": ("xlm-roberta", {}, "mean", (), {"query": "query: ", "document": "passage: "}),
    "qwen3-embedding": ("qwen3", {}, "lasttoken", (), {"query": "Instruct: X\nQuery:"}),
    "embedding-gemma": (
        *("gemma3", {"use_bidirectional_attention": True}, "mean", (80, 24)),
        {"query": "task: search result | query: ", "document": "title: none | text: "},
    ),
    "unmasked": ("llama", {"is_causal": False}, "mean", (), {}),
}


def save_sentences(directory: Path, name: str) -> Any:
    """Writes a random model of SENTENCES by sentence-transformers, and returns its own reading."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Dense, Normalize, Pooling, Transformer

    family, changes, pooling, widths, prompts = SENTENCES[name]
    inner = directory.with_name(f"{directory.name}-transformer")
    model = torch_model(family, **changes)
    model.save_pretrained(inner)
    save_tokenizer(inner, chat=False, pad_id=model.config.pad_token_id)
    transformer = Transformer(str(inner))
    width = model.config.hidden_size
    modules = [transformer, Pooling(width, pooling_mode=pooling)]
    for out in widths:
        modules.append(Dense(width, out, bias=False, activation_function=torch.nn.Identity()))
        width = out
    whole = SentenceTransformer(modules=[*modules, Normalize()], prompts=prompts, device="cpu")
    whole.save(str(directory))
    return SentenceTransformer(str(directory), device="cpu")
