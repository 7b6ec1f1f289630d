"""One step of step A with an adapter on frozen weights, beside the same with all weights.

16 queries and 32 passages of 128 tokens, in micro-batches, float32. Both sides are this project's:
SmolLM2 as a retriever, and MiniLM. An adapter that is new changes nothing, so the first losses are
equal. A side's setting says what it had in memory once its weights were loaded; the rest of its
peak is what training takes.
"""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from eval.benchmarks import Comparison, Running, check_close, minilm, per_second, smollm2

QUERIES, LENGTH, MICRO_BATCH = 16, 128, 4
RANK = 8
TOWERS = ("query", "positive", "negative")
MODELS = ("SmolLM2", "MiniLM")


def prepare(directory: pathlib.Path) -> None:
    """Writes SmolLM2, and each model's ids of texts that are all as long as they may be."""
    minilm.write_pydoc(directory)
    smollm2.export(directory)
    documents = minilm.spread(minilm.read_pydoc(directory)[1], 1000)
    for model in MODELS:
        retriever, _ = _load(directory, model)
        full = [ids for ids in retriever.token_ids(documents) if len(ids) == LENGTH]
        rows = np.array(full[: QUERIES * len(TOWERS)]).reshape(len(TOWERS), QUERIES, LENGTH)
        np.savez(directory / f"{model}.npz", **dict(zip(TOWERS, rows, strict=True)))


def _load(directory: pathlib.Path, model: str):
    """This project's retriever and parameters."""
    if model == "MiniLM":
        return minilm.load(LENGTH)
    from expandr_jax.weights.hf import load_retriever

    path = str(smollm2.export(directory))
    return load_retriever(path, pooling="mean", normalize=True, max_length=LENGTH)


def start(directory: pathlib.Path, model: str, rank: int) -> Running:
    """Step A's program, as the trainer sets it up."""
    import dataclasses

    import jax
    import psutil

    from configs import base
    from expandr_jax.models.lora import LoraConfig
    from expandr_jax.objectives.contrastive import contrastive_setup
    from expandr_jax.objectives.contrastive_batches import (
        ContrastiveExample,
        Passage,
        make_batch,
    )
    from expandr_jax.objectives.trained import divided
    from expandr_jax.sharding import device_put, make_mesh
    from expandr_jax.training.train_state import make_optimizer

    retriever, params = _load(directory, model)
    jax.block_until_ready(params)
    loaded = psutil.Process().memory_info().rss
    if rank:
        lora = LoraConfig(rank, 4.0 * rank, 0.0, ("_proj$",))
        retriever = dataclasses.replace(retriever, module=retriever.module.clone(lora=lora))
    settings = base.get_config().contrastive
    settings.micro_batch = MICRO_BATCH
    with np.load(directory / f"{model}.npz", allow_pickle=False) as file:
        texts = {name: file[name] for name in TOWERS}
    examples = [
        ContrastiveExample(
            query=texts["query"][i],
            expansions=[],
            positive=Passage(texts["positive"][i], f"positive {i}"),
            negatives=[Passage(texts["negative"][i], f"negative {i}")],
        )
        for i in range(QUERIES)
    ]
    batch = make_batch(examples, retriever.tokenizer.pad_token_id, 0, 1, longest=LENGTH)
    setup = contrastive_setup(make_mesh(), retriever, params, settings, make_optimizer(1e-5, 1000))
    frozen, trained = divided(retriever, params, 0)
    frozen = device_put(frozen, setup.frozen)
    state = setup.create(trained)
    del params, trained  # As in a run: the state is the only copy of what is trained.

    def update() -> dict[str, np.ndarray]:
        nonlocal state
        state, metrics = jax.block_until_ready(setup.step(state, *frozen, batch, None))
        return {"loss": np.array(metrics["loss"])}

    outputs = update()
    update()
    return Running(per_second(1, update), outputs, f"{loaded / 1e9:.2f} GB before training")


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
