"""One step of step A with an adapter on frozen weights, beside the same with all weights.

16 queries and 32 passages of 128 tokens, in micro-batches, float32. Both sides are this project's:
SmolLM2 as a retriever, and MiniLM. An adapter that is new changes nothing, so the first losses are
equal. A side's setting says what it had in memory once its weights were loaded; the rest of its
peak is what training takes.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from eval.benchmarks import Comparison, Running, check_close, contrastive, minilm, smollm2

QUERIES, MICRO_BATCH, RANK = 16, 4, 8
TOWERS = ("query", "positive", "negative")
MODELS = ("SmolLM2", "MiniLM")


def prepare(directory: pathlib.Path) -> None:
    """Writes SmolLM2, and each model's ids of texts that are all as long as they may be."""
    smollm2.export(directory)
    for model in MODELS:
        retriever, _ = _load(directory, model)
        contrastive.write_texts(directory, f"{model}.npz", retriever, TOWERS, QUERIES)


def _load(directory: pathlib.Path, model: str):
    """This project's retriever and parameters."""
    length = contrastive.LENGTH
    if model == "MiniLM":
        return minilm.load(length)
    from expandr_jax.weights.hf import load_retriever

    path = str(smollm2.export(directory))
    return load_retriever(path, pooling="mean", normalize=True, max_length=length)


def start(directory: pathlib.Path, model: str, rank: int) -> Running:
    """Step A's program with an adapter of a rank, or, of rank 0, of all weights."""
    import jax
    import psutil

    from configs import base
    from expandr_jax.models.lora import LoraConfig

    loaded = 0

    def load() -> tuple:
        nonlocal loaded
        retriever, params = _load(directory, model)
        jax.block_until_ready(params)
        loaded = psutil.Process().memory_info().rss
        if rank:
            lora = LoraConfig(rank, 4.0 * rank, 0.0, ("_proj$",))
            retriever = dataclasses.replace(retriever, module=retriever.module.clone(lora=lora))
        return retriever, params

    settings = base.get_config().contrastive
    settings.micro_batch = MICRO_BATCH
    texts = contrastive.read_texts(directory, f"{model}.npz")
    running = contrastive.step_a(load, settings, texts)
    return dataclasses.replace(running, setting=f"{loaded / 1e9:.2f} GB before training")


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Losses are equal."""
    return check_close(ours["loss"], theirs["loss"], 1e-4, "losses")


ROWS = tuple(
    Comparison(
        name=f"LoRA step, {model}",
        unit="steps/s",
        peer_name="all weights",
        packages=(),
        ours=functools.partial(start, model=model, rank=RANK),
        peer=functools.partial(start, model=model, rank=0),
        check=check,
    )
    for model in MODELS
)
