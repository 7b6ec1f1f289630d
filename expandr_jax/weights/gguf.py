"""GGUF, llama.cpp's format: tensors, configuration and tokenizer in Hugging Face's terms."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.gguf_reader import GgufReader
from expandr_jax.weights.gguf_tokenizer import ends_of_turn, read_gguf_tokenizer

_ARCHITECTURES = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
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
_ROTARY = re.compile(r"[qk]_proj\.weight$")
# Norms that only Gemma has, or that have another place in it.
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class GgufFile:
    """One GGUF file; a `ModelFiles`."""

    def __init__(self, path: Path):
        """Reads the header; raises UserError if the file or its architecture cannot be read."""
        self.where, self.files = str(path), [path]
        self._reader = GgufReader(path)
        self._metadata = Fields(self._reader.metadata, self.where)
        known = tuple(_ARCHITECTURES)
        self._architecture = self._metadata.choice("general.architecture", known)
        block = _BLOCK | (_GEMMA_NORMS if self._architecture == "gemma3" else {})
        self._names = {_hf_name(name, block): name for name in self._reader.tensors}
        self._names.pop(_ROPE_FACTORS, None)
        config = self._config()
        self.config = Fields(config, self.where)
        self.model_type = config["model_type"]
        eos = config["eos_token_id"]
        ends = [eos, *(end for end in ends_of_turn(self._metadata) if end != eos)]
        generation = {"eos_token_id": ends} if len(ends) > 1 else {}
        self.generation_config = Fields(generation, self.where)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        return {ours: self._reader.tensors[name].shape for ours, name in self._names.items()}

    def dtypes(self) -> dict[str, np.dtype]:
        """Types of all tensors by name: those they have once dequantized."""
        return {name: np.dtype(np.float32) for name in self._names}

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """One tensor, or some rows of it, in float32, as the original model had it."""
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            return self._reader.read(self._names[name], rows) - 1  # llama.cpp keeps 1 + w
        if self._architecture != "llama" or not _ROTARY.search(name):
            return self._reader.read(self._names[name], rows)
        # llama.cpp interleaves the halves that rotate together.
        array = self._reader.read(self._names[name])
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        heads = self.config.count(key)
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(array.shape)[rows]

    def _config(self) -> dict[str, Any]:
        """The metadata as a Hugging Face configuration."""
        kind, class_name = _ARCHITECTURES[self._architecture]
        heads, width = self._count("attention.head_count"), self._count("embedding_length")
        eps = np.float32(self._number("attention.layer_norm_rms_epsilon"))
        embedding = self.shapes().get("model.embed_tokens.weight")
        if not embedding:
            raise UserError(f"{self.where}: tensor token_embd.weight is missing")
        config = {
            "architectures": [class_name],
            "model_type": kind,
            "vocab_size": embedding[0],
            "hidden_size": width,
            "num_hidden_layers": self._count("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._count("attention.head_count_kv"),
            "head_dim": self._count("attention.key_length", width // heads),
            "intermediate_size": self._count("feed_forward_length"),
            "max_position_embeddings": self._count("context_length"),
            "hidden_act": "silu",
            # Stored in float32; the shortest decimal that gives the same is what was meant.
            "rms_norm_eps": float(str(eps)),
            "rope_theta": float(self._number("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "lm_head.weight" not in self._names,
            "bos_token_id": self._token_id("bos", None),
            "eos_token_id": self._token_id("eos"),
            "pad_token_id": self._token_id("padding", None),
            "dtype": "float32",
        }
        if kind == "gemma3_text":
            config |= self._gemma_config(config)
        scaling = self._rope_scaling(config["rope_theta"], config["head_dim"])
        return config if scaling is None else {**config, "rope_scaling": scaling}

    def _gemma_config(self, config: dict[str, Any]) -> dict[str, Any]:
        # The largest model scales its scores by its width, the others by the head's; llama.cpp too
        # knows which is which by the depth alone.
        largest = config["num_hidden_layers"] == 62
        per_head = config["hidden_size"] // config["num_attention_heads"]
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": per_head if largest else config["head_dim"],
            "rope_local_base_freq": float(self._number("rope.freq_base_swa", 10000.0)),
            "sliding_window": self._count("attention.sliding_window"),
            "sliding_window_pattern": 6,
        }

    def _rope_scaling(self, theta: float, head_dim: int) -> dict[str, Any] | None:
        """Llama 3.1's settings, recovered from the divisors of the frequencies that they gave."""
        name = f"{self._architecture}.rope.scaling.type"
        kind = self._metadata.choice(name, ("none", "linear"), "none")
        if kind == "linear":
            return {"rope_type": "linear", "factor": self._number("rope.scaling.factor")}
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
        """The tokenizer that the file describes, chat template included."""
        return read_gguf_tokenizer(self._metadata)

    def _count(self, key: str, *default: int) -> int:
        return self._metadata.count(f"{self._architecture}.{key}", *default)

    def _number(self, key: str, *default: float) -> float:
        return self._metadata.number(f"{self._architecture}.{key}", *default, above=0)

    def _token_id(self, key: str, *default: Any) -> int | None:
        return self._metadata.count(f"tokenizer.ggml.{key}_token_id", *default, least=0)


def _hf_name(name: str, block: Mapping[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in block:
        return f"model.layers.{match[1]}.{block[match[2]]}.{suffix}"
    return name
