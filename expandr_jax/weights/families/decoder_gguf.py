"""How llama.cpp has each kind of decoder: its GGUF files are read and written by that."""

import math
from collections.abc import Mapping
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.models.decoder import DecoderConfig
from expandr_jax.weights.families.family import GgufForm
from expandr_jax.weights.fields import Fields

_EVERY = 6  # llama.cpp has each sixth layer of Gemma 3 see everything.
# Layers of the one Gemma 3 whose scores are scaled by the width, and not by the head's: llama.cpp,
# too, knows which it is by the depth alone.
_LARGEST = 62
# What Ollama's converter calls these keys of Gemma 3.
_OLLAMA = {"rope.global.freq_base": "rope.freq_base", "rope.local.freq_base": "rope.freq_base_swa"}


def _read_gemma(own: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    largest, width = config["num_hidden_layers"] == _LARGEST, config["head_dim"]
    if largest:
        width = config["hidden_size"] // config["num_attention_heads"]
    found = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width,
        "rope_local_base_freq": float(own.number("rope.freq_base_swa", 10000.0, above=0)),
        "sliding_window": own.count("attention.sliding_window"),
        "sliding_window_pattern": _EVERY,
    }
    slides = own.values.get("attention.sliding_window_pattern")  # A number, or one by one.
    if isinstance(slides, list):
        found["layer_types"] = [f"{'sliding' if x else 'full'}_attention" for x in slides]
    return found


def _write_gemma(config: DecoderConfig) -> dict[str, Any]:
    layers = config.num_layers
    expected = tuple((layer + 1) % _EVERY != 0 for layer in range(layers))
    if config.sliding_window is None or config.layer_is_local != expected:
        raise UserError(f"llama.cpp has layers of Gemma 3 see a window, but for each {_EVERY}th")
    width = config.hidden_size // config.num_heads if layers == _LARGEST else config.head_dim
    if not math.isclose(config.query_scale, width**-0.5):
        raise UserError(f"query_pre_attn_scalar is not {width}, by which llama.cpp scales scores")
    return {
        "attention.sliding_window": config.sliding_window,
        "rope.freq_base_swa": float(config.rope_local_theta),
    }


def _gemma_keys(own: Fields) -> Fields:
    """Keys of Ollama's converter as llama.cpp's has them, with what its own program knows."""
    if not any(name in own for name in _OLLAMA):
        return own
    values = {
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **{usual: own.values[name] for name, usual in _OLLAMA.items() if name in own},
        **{name: value for name, value in own.values.items() if name not in _OLLAMA},
    }
    for name, usual in _OLLAMA.items():
        if name in own and values[usual] != own.values[name]:
            raise own.refuse(name, f"the same as gemma3.{usual}, {values[usual]}")
    if own.count("context_length") > 32768 and "rope.scaling.factor" not in own:
        # Their positions are divided by 8, which this converter does not write.
        raise own.refuse(
            "context_length", "at most 32768 where Ollama left out rope.scaling.factor"
        )
    return Fields(values, own.where, "gemma3.")


_LLAMA = GgufForm("llama", interleaved=True, stretches=True)
GGUF_FORMS = {
    "gemma3_text": GgufForm(
        "gemma3",
        activation="gelu_tanh",
        # Norms that only Gemma has, or that have another place in it.
        tensors={
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        norm_plus_one=True,
        keys=_gemma_keys,
        read=_read_gemma,
        write=_write_gemma,
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GgufForm("qwen2"),
    "qwen3": GgufForm("qwen3"),
}
