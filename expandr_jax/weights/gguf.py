"""GGUF, llama.cpp's format: tensors, configuration and tokenizer in Hugging Face's terms."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from expandr_jax.errors import UserError
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
        self._architecture = self._field("general.architecture")
        if self._architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UserError(
                f"{path}: architecture {self._architecture!r} is not supported; supported: {known}"
            )
        block = _BLOCK | (_GEMMA_NORMS if self._architecture == "gemma3" else {})
        self._names = {_hf_name(name, block): name for name in self._reader.tensors}
        self._names.pop(_ROPE_FACTORS, None)
        self.config = self._config()
        self.model_type = self.config["model_type"]
        eos = self.config["eos_token_id"]
        ends = [eos, *(end for end in ends_of_turn(self._reader.metadata) if end != eos)]
        self.generation_config = {"eos_token_id": ends} if len(ends) > 1 else None

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
        heads = self.config[key]
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(array.shape)[rows]

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
            "rope_local_base_freq": float(self._of_model("rope.freq_base_swa", 10000.0)),
            "sliding_window": self._attention("sliding_window"),
            "sliding_window_pattern": 6,
        }

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
        """The tokenizer that the file describes, chat template included."""
        return read_gguf_tokenizer(self._reader.metadata, self.where)

    def _attention(self, key: str, *default: Any) -> Any:
        return self._of_model(f"attention.{key}", *default)

    def _of_model(self, key: str, *default: Any) -> Any:
        return self._field(f"{self._architecture}.{key}", *default)

    def _field(self, key: str, *default: Any) -> Any:
        if key not in self._reader.metadata and not default:
            raise UserError(f"{self.where}: metadata {key!r} is missing")
        return self._reader.metadata.get(key, *default)


def _hf_name(name: str, block: Mapping[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in block:
        return f"model.layers.{match[1]}.{block[match[2]]}.{suffix}"
    return name
