"""Loading a model: MiniLM as a retriever, SmolLM2 as a generator, in float32, from their files.

Each turn reads config, tokenizer and weights anew, in a process that has imported its libraries and
from files that the system has in memory. The tables of word embeddings are compared.
"""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eval.benchmarks import Comparison, Running, check_close, minilm, per_second, smollm2


def prepare(directory: pathlib.Path) -> None:
    """Writes SmolLM2 as a directory that both sides load."""
    smollm2.export(directory)


def _start(load: Callable[[], Any], embeddings: Callable[[Any], Any]) -> Running:
    outputs = {"embeddings": np.asarray(embeddings(load()), np.float32)}
    return Running(per_second(1, load), outputs)


def start_our_retriever(directory: pathlib.Path) -> Running:
    """`load_retriever`."""
    return _start(lambda: _on_devices(minilm.load(256)[1]), lambda params: params["embedding"])


def start_our_generator(directory: pathlib.Path) -> Running:
    """`load_generator`."""

    def load() -> Any:
        return _on_devices(smollm2.load(directory)[1])

    return _start(load, lambda params: params["embedding"])


def _on_devices(params: Any) -> Any:
    import jax

    return jax.block_until_ready(params)


def start_sentence_transformers(directory: pathlib.Path) -> Running:
    """`SentenceTransformer`."""
    from sentence_transformers import SentenceTransformer

    def embeddings(model: Any) -> Any:
        return model[0].auto_model.get_input_embeddings().weight.detach().numpy()

    return _start(lambda: SentenceTransformer(minilm.path(), device="cpu"), embeddings)


def start_transformers(directory: pathlib.Path) -> Running:
    """`AutoTokenizer` and `AutoModelForCausalLM`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = directory / "smollm2"

    def load() -> Any:
        AutoTokenizer.from_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    return _start(load, lambda model: model.get_input_embeddings().weight.detach().numpy())


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """The word embeddings are the same numbers."""
    return check_close(ours["embeddings"], theirs["embeddings"], 0.0, "word embeddings")


ROWS = (
    Comparison(
        name="load, MiniLM",
        unit="loads/s",
        peer_name="sentence-transformers",
        packages=("sentence-transformers", *minilm.PACKAGES),
        ours=start_our_retriever,
        peer=start_sentence_transformers,
        check=check,
    ),
    Comparison(
        name="load, SmolLM2",
        unit="loads/s",
        peer_name="transformers",
        packages=("transformers", "torch"),
        ours=start_our_generator,
        peer=start_transformers,
        check=check,
    ),
)
