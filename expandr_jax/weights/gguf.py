"""GGUF, llama.cpp's format: tensors, configuration and tokenizer in Hugging Face's terms."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from expandr_jax.errors import UserError
from expandr_jax.models.pooling import Pooling
from expandr_jax.models.rope import RopeScaling, scale_frequencies
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.files import ModelFiles
from expandr_jax.weights.gguf_reader import GgufReader
from expandr_jax.weights.gguf_tokenizer import ends_of_turn, read_gguf_tokenizer

ARCHITECTURES = {
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
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
# Keys behind the architecture's name: those that are read here, and those that change nothing.
_KEYS = (
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "block_count",
    "context_length", "embedding_length", "feed_forward_length", "pooling_type", "rope.freq_base",
    "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.factor", "rope.scaling.type",
)  # fmt: skip
_UNREAD = (
    "attention.layer_norm_epsilon", "rope.scaling.finetuned", "tensor_data_layout", "vocab_size",
    "rope.scaling.original_context_length",
)  # fmt: skip
# What Ollama's converter calls these keys of Gemma 3.
_OLLAMA = {"rope.global.freq_base": "rope.freq_base", "rope.local.freq_base": "rope.freq_base_swa"}
_PATTERN = "attention.sliding_window_pattern"  # Each so many layers one sees all; or a list.
_POOLINGS: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
ROPE_FACTORS = "rope_freqs.weight"
_SPECIAL = re.compile(r"tokenizer\.ggml\.(?!eos_)\w+_token_id")
ROTARY = re.compile(r"[qk]_proj\.weight$")
# Norms that only Gemma has, or that have another place in it.
_GEMMA_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def open_gguf(path: Path) -> ModelFiles:
    """Opens one GGUF file; raises UserError if it or its architecture cannot be read."""
    reader = GgufReader(path)
    # Some converters write -1 where there is no such token; only the end must be one.
    last = len(reader.metadata.get("tokenizer.ggml.tokens", ())) - 1
    metadata = Fields(
        {
            key: value
            for key, value in reader.metadata.items()
            if not (_SPECIAL.fullmatch(key) and type(value) is int and value > last)
        },
        str(path),
    )
    metadata.only(**{"general.type": "model"})
    if (parts := metadata.count("split.count", 1, least=0)) > 1:
        raise UserError(
            f"{path}: it is one of {parts} parts: join them by llama-gguf-split --merge"
        )
    architecture = metadata.choice("general.architecture", tuple(ARCHITECTURES))
    block = block_names(architecture)
    stored = {_hf_name(name, block): name for name in reader.tensors}
    stored.pop(ROPE_FACTORS, None)
    tensors = {
        name: jax.ShapeDtypeStruct(reader.tensors[key].shape, np.float32)
        for name, key in stored.items()
    }
    config = Fields(_config(metadata, architecture, tensors, reader), str(path))
    eos = config.values["eos_token_id"]
    ends = [eos, *(end for end in ends_of_turn(metadata) if end != eos)]
    pooling = metadata.count(f"{architecture}.pooling_type", 0, least=0)
    if pooling and pooling not in _POOLINGS:
        raise metadata.refuse(f"{architecture}.pooling_type", "1 (mean), 2 (cls) or 3 (last)")

    def read(name: str, rows: slice) -> np.ndarray:
        """In float32, as the original model had it."""
        if architecture == "gemma3" and name.endswith("norm.weight"):
            return reader.read(stored[name], rows) - 1  # llama.cpp keeps 1 + w
        if architecture != "llama" or not ROTARY.search(name):
            return reader.read(stored[name], rows)
        # llama.cpp interleaves the halves that rotate together.
        array = reader.read(stored[name])
        heads = config.count("num_attention_heads" if "q_proj" in name else "num_key_value_heads")
        pairs = array.reshape(heads, array.shape[0] // heads // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(array.shape)[rows]

    return ModelFiles(
        where=str(path),
        files=[path],
        config=config,
        generation_config=Fields({"eos_token_id": ends} if len(ends) > 1 else {}, str(path)),
        model_type=config.values["model_type"],
        tensors=tensors,
        read=read,
        tokenizer=lambda: read_gguf_tokenizer(metadata, config.count("vocab_size")),
        pooling=_POOLINGS.get(pooling),
    )


def _config(
    metadata: Fields,
    architecture: str,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    reader: GgufReader,
) -> dict[str, Any]:
    """The metadata as a Hugging Face configuration."""
    kind, class_name = ARCHITECTURES[architecture]
    own, tokenizer = metadata.under(f"{architecture}."), metadata.under("tokenizer.ggml.")
    own = _as_llama_cpp(own, architecture)
    heads, width = own.count("attention.head_count"), own.count("embedding_length")
    head_dim, context = (
        own.count("attention.key_length", width // heads),
        own.count("context_length"),
    )
    eps = np.float32(own.number("attention.layer_norm_rms_epsilon", above=0))
    if "model.embed_tokens.weight" not in tensors:
        raise UserError(f"{metadata.where}: tensor token_embd.weight is missing")
    config = {
        "architectures": [class_name],
        "model_type": kind,
        "vocab_size": tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": own.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": own.count("attention.head_count_kv"),
        "head_dim": head_dim,
        "intermediate_size": own.count("feed_forward_length"),
        "max_position_embeddings": context,
        "hidden_act": "silu",
        # Stored in float32; the shortest decimal that gives the same is what was meant.
        "rms_norm_eps": float(str(eps)),
        "rope_theta": float(own.number("rope.freq_base", 10000.0, above=0)),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": tokenizer.count("bos_token_id", None, least=0),
        "eos_token_id": tokenizer.count("eos_token_id", least=0),
        "pad_token_id": tokenizer.count("padding_token_id", None, least=0),
        "dtype": "float32",
    }
    slides = own.items(_PATTERN, bool) if isinstance(own.values.get(_PATTERN), list) else None
    own.strict(
        *_KEYS,
        *_UNREAD,
        **dict.fromkeys(("attention.value_length", "rope.dimension_count"), head_dim),
        **dict.fromkeys(("expert_count", "expert_used_count"), 0),
        **{"rope.scaling.attn_factor": 1.0, "attention.head_dim": head_dim},
        **{"attention.causal": True, "use_parallel_residual": False},
        **{f"attention.{name}_length_swa": head_dim for name in ("key", "value")},
        **{"rope.dimension_count_swa": head_dim, _PATTERN: 6 if slides is None else slides},
    )
    if kind == "gemma3_text":
        # The largest model scales its scores by its width, the others by the head's; llama.cpp too
        # knows which is which by the depth alone.
        largest = config["num_hidden_layers"] == 62
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": width // heads if largest else config["head_dim"],
            "rope_local_base_freq": float(own.number("rope.freq_base_swa", 10000.0, above=0)),
            "sliding_window": own.count("attention.sliding_window"),
            "sliding_window_pattern": 6,
        }
        if slides is not None:
            types = [f"{'sliding' if local else 'full'}_attention" for local in slides]
            config["layer_types"] = types
    elif 0 < own.count("attention.sliding_window", context, least=0) < context:
        raise own.refuse("attention.sliding_window", f"none below the context's length, {context}")
    # As in llama.cpp: linear where no type is said, by the factor's old name where the new is not.
    kind = own.choice("rope.scaling.type", ("none", "linear"), "linear")
    name = "rope.scaling.factor" if "rope.scaling.factor" in own else "rope.scale_linear"
    factor = own.number(name, 1.0) or 1.0
    if kind == "linear" and factor != 1:
        if factor < 0 or ROPE_FACTORS in reader.tensors:
            raise own.refuse(name, f"one above 0, and no {ROPE_FACTORS} beside it")
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif ROPE_FACTORS in reader.tensors:
        plain = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
        config["rope_scaling"] = _llama3_scaling(reader.read(ROPE_FACTORS), plain, metadata.where)
    return config


def _as_llama_cpp(own: Fields, architecture: str) -> Fields:
    """Keys as llama.cpp's converter has them, with what Ollama's leaves to its program."""
    if architecture != "gemma3" or not any(name in own for name in _OLLAMA):
        return own
    values = {
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **{usual: own.values[name] for name, usual in _OLLAMA.items() if name in own},
        **{name: value for name, value in own.values.items() if name not in _OLLAMA},
    }
    for name, usual in _OLLAMA.items():
        if name in own and values[usual] != own.values[name]:
            raise own.refuse(name, f"the same as {architecture}.{usual}, {values[usual]}")
    if own.count("context_length") > 32768 and "rope.scaling.factor" not in own:
        # Their positions are divided by 8, which this converter does not write.
        raise own.refuse(
            "context_length", "at most 32768 where Ollama left out rope.scaling.factor"
        )
    return Fields(values, own.where, f"{architecture}.")


def _llama3_scaling(divisors: np.ndarray, plain: np.ndarray, where: str) -> dict[str, Any]:
    """Llama 3.1's settings, recovered from what they divided the plain frequencies by."""
    factor = round(float(divisors.max()), 3)  # a division in float32 gave it
    scaling = RopeScaling("llama3", factor, 1.0, 4.0, 8192)  # as every Llama 3 so far
    expected = plain / np.asarray(scale_frequencies(plain, scaling))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f"{where}: {ROPE_FACTORS} is not Llama 3's rope scaling")
    return {
        "rope_type": scaling.kind,
        "factor": factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def block_names(architecture: str) -> dict[str, str]:
    """What a block's tensors are called: llama.cpp's name to Hugging Face's."""
    return BLOCK | (_GEMMA_NORMS if architecture == "gemma3" else {})


def _hf_name(name: str, block: Mapping[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in block:
        return f"model.layers.{match[1]}.{block[match[2]]}.{suffix}"
    return name
