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
from expandr_jax.weights.families import BY_TYPE
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.files import ModelFiles
from expandr_jax.weights.gguf_reader import GgufReader
from expandr_jax.weights.gguf_tokenizer import ends_of_turn, read_gguf_tokenizer

# llama.cpp's architectures -> model_type in config.json; of several the first that a family lists.
ARCHITECTURES = {
    family.gguf[kind].architecture: kind
    for kind, family in reversed(BY_TYPE.items())
    if kind in family.gguf
}
OTHER_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_TENSORS = {
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
_PATTERN = "attention.sliding_window_pattern"  # Each so many layers one sees all; or a list.
_POOLINGS: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last"}
ROPE_FACTORS = "rope_freqs.weight"
_SPECIAL = re.compile(r"tokenizer\.ggml\.(?!eos_)\w+_token_id")
ROTARY = re.compile(r"[qk]_proj\.weight$")


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
    architecture = metadata.choice("general.architecture", sorted(ARCHITECTURES))
    kind = ARCHITECTURES[architecture]
    form = BY_TYPE[kind].gguf[kind]
    block = LAYER_TENSORS | form.tensors
    stored = {_hf_name(name, block): name for name in reader.tensors}
    stored.pop(ROPE_FACTORS, None)
    tensors = {
        name: jax.ShapeDtypeStruct(reader.tensors[key].shape, np.float32)
        for name, key in stored.items()
    }
    config = Fields(_config(metadata, kind, tensors, reader), str(path))
    eos = config.values["eos_token_id"]
    ends = [eos, *(end for end in ends_of_turn(metadata) if end != eos)]
    pooling = metadata.count(f"{architecture}.pooling_type", 0, least=0)
    if pooling and pooling not in _POOLINGS:
        raise metadata.refuse(f"{architecture}.pooling_type", "1 (mean), 2 (cls) or 3 (last)")

    def read(name: str, rows: slice) -> np.ndarray:
        """Reads rows of a tensor in float32, in the original model's layout."""
        if form.norm_plus_one and name.endswith("norm.weight"):
            return reader.read(stored[name], rows) - 1  # llama.cpp keeps 1 + w
        if not form.interleaved or not ROTARY.search(name):
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
    model_type: str,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    reader: GgufReader,
) -> dict[str, Any]:
    """The metadata as a Hugging Face configuration."""
    family = BY_TYPE[model_type]
    form, (_, class_name) = family.gguf[model_type], family.classes[model_type]
    own = form.keys(metadata.under(f"{form.architecture}."))
    tokenizer = metadata.under("tokenizer.ggml.")
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
        "model_type": model_type,
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
    if form.read is not None:
        config |= form.read(own, config)
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


def _hf_name(name: str, block: Mapping[str, str]) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in OTHER_TENSORS:
        return f"{OTHER_TENSORS[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in block:
        return f"model.layers.{match[1]}.{block[match[2]]}.{suffix}"
    return name
