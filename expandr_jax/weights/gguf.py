"""GGUF, llama.cpp's format: tensors, configuration and tokenizer in Hugging Face's terms."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
from expandr_jax.weights.gguf_reader import GgufReader

_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before merging, by tokenizer.ggml.pre.
_SPLITS = {
    "smollm": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}


class GgufFile:
    """One GGUF file; a `ModelFiles`."""

    generation_config = None

    def __init__(self, path: Path):
        """Reads the header; raises UserError if the file or its architecture cannot be read."""
        self.where, self.files = str(path), [path]
        self._reader = GgufReader(path)
        self._architecture = self._field("general.architecture")
        if self._architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UserError(
                f"{path}: architecture {self._architecture!r} is not supported; supported: {known}"
            )
        self._names = {_hf_name(name): name for name in self._reader.tensors}
        self._names.pop(_ROPE_FACTORS, None)
        self.config = self._config()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {ours: self._reader.tensors[name].shape for ours, name in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor in float32, dequantized, with llama.cpp's order of rotary rows undone."""
        array = self._reader.read(self._names[name])
        if self._architecture == "llama" and re.search(r"[qk]_proj\.weight$", name):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            heads = self.config[key]
            pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        return array

    def _config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face configuration."""
        kind, class_name = _ARCHITECTURES[self._architecture]
        heads, width = self._attention("head_count"), self._of_model("embedding_length")
        config = {
            "architectures": [class_name],
            "model_type": kind,
            "vocab_size": self.shapes()["model.embed_tokens.weight"][0],
            "hidden_size": width,
            "num_hidden_layers": self._of_model("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._attention("head_count_kv"),
            "head_dim": self._attention("key_length", width // heads),
            "intermediate_size": self._of_model("feed_forward_length"),
            "max_position_embeddings": self._of_model("context_length"),
            "hidden_act": "silu",
            # Stored in float32; the shortest decimal that gives the same is what was meant.
            "rms_norm_eps": float(str(np.float32(self._attention("layer_norm_rms_epsilon")))),
            "rope_theta": float(self._of_model("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "lm_head.weight" not in self._names,
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._field("tokenizer.ggml.padding_token_id", None),
            "dtype": "float32",
        }
        scaling = self._rope_scaling(config["rope_theta"], config["head_dim"])
        return config if scaling is None else {**config, "rope_scaling": scaling}

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """Llama 3.1's settings, recovered from the divisors of the frequencies that they gave."""
        kind = self._of_model("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise UserError(f"{self.where}: rope scaling {kind!r} is not supported")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._of_model("rope.scaling.factor")}
        if _ROPE_FACTORS not in self._reader.tensors:
            return None
        divisors = self._reader.read(_ROPE_FACTORS)
        factor = round(float(divisors.max()), 3)  # a division in float32 gave it
        low, high, original = 1.0, 4.0, 8192  # of every Llama 3 so far
        turns = original * theta ** -(np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
        kept = np.clip((turns - low) / (high - low), 0, 1)
        expected = 1 / (kept + (1 - kept) / factor)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
            raise UserError(f"{self.where}: {_ROPE_FACTORS} is not Llama 3's rope scaling")
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Builds the byte-level BPE tokenizer that the file describes, chat template included."""
        kind, split = self._field("tokenizer.ggml.model"), self._field("tokenizer.ggml.pre", None)
        if kind != "gpt2" or split not in _SPLITS:
            raise UserError(
                f"{self.where}: tokenizer {kind!r} with pre {split!r} is not supported; supported: "
                f"gpt2 with pre {', '.join(_SPLITS)}"
            )
        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(pair.split(" ")) for pair in self._field("tokenizer.ggml.merges")]
        vocab = {token: index for index, token in enumerate(tokens)}
        # Llama 3 keeps some merges that its table of tokens makes unreachable; it skips them too.
        try:
            backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=split == "llama-bpe"))
        except Exception as error:  # tokenizers raises nothing narrower
            raise UserError(f"{self.where}: its tokenizer is damaged: {error}") from None
        if _SPLITS[split] is None:
            cut = [pre_tokenizers.Digits(individual_digits=True)]
        else:
            cut = [pre_tokenizers.Split(Regex(_SPLITS[split]), "isolated")]
        to_bytes = pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=_SPLITS[split] is None
        )
        if split == "qwen2":
            backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
        backend.decoder = decoders.ByteLevel()
        types = enumerate(self._field("tokenizer.ggml.token_type"))
        backend.add_tokens(
            [
                AddedToken(tokens[index], special=kind == _CONTROL, normalized=False)
                for index, kind in types
                if kind in (_CONTROL, _USER_DEFINED)
            ]
        )
        special = {
            f"{name}_token": tokens[self._field(f"tokenizer.ggml.{field}_token_id")]
            for name, field in (
                ("bos", "bos"),
                ("eos", "eos"),
                ("unk", "unknown"),
                ("pad", "padding"),
            )
            if self._field(f"tokenizer.ggml.{field}_token_id", None) is not None
        }
        if self._field("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
            bos = special["bos_token"]
            backend.post_processor = processors.TemplateProcessing(
                f"{bos} $A", f"{bos} $A {bos} $B", [(bos, vocab[bos])]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=self._field("tokenizer.chat_template", None),
            model_max_length=self._of_model("context_length"),
            model_input_names=["input_ids", "attention_mask"],
            clean_up_tokenization_spaces=False,
            **special,
        )

    def _attention(self, key: str, *default: Any) -> Any:
        return self._of_model(f"attention.{key}", *default)

    def _of_model(self, key: str, *default: Any) -> Any:
        return self._field(f"{self._architecture}.{key}", *default)

    def _field(self, key: str, *default: Any) -> Any:
        if key not in self._reader.metadata and not default:
            raise UserError(f"{self.where}: metadata {key!r} is missing")
        return self._reader.metadata.get(key, *default)


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in _BLOCK:
        return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{suffix}"
    return name
