"""One step of step A: 32 queries with an expansion each, 64 passages, 128 tokens each, float32.

Forward, backward, clipping and AdamW on MiniLM. With expansions the peer is plain PyTorch, which
computes DESIGN's loss on transformers' model; without them it is sentence-transformers with its
MultipleNegativesRankingLoss. Dropout is off on all sides, so that one gradient can be compared
with the other.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.benchmarks import Comparison, Running, check_close, minilm, per_second

QUERIES, LENGTH = 32, 128
TEMPERATURE, WEIGHT, CLIP_NORM, LEARNING_RATE = 0.02, 0.5, 1.0, 1e-5
STEPS = 1000  # Length of the learning rate's schedule.
TOWERS = ("query", "positive", "negative", "expansion")


def prepare(directory: pathlib.Path) -> None:
    """Writes ids of texts that are all as long as they may be."""
    retriever, _ = minilm.load(LENGTH)
    write_texts(directory, "texts.npz", retriever, TOWERS, QUERIES)


def write_texts(
    directory: pathlib.Path, name: str, retriever: Any, towers: Sequence[str], queries: int
) -> None:
    """Writes a retriever's ids of pydoc's texts, [queries, LENGTH] of each tower."""
    minilm.write_pydoc(directory)
    tokens = retriever.token_ids(minilm.spread(minilm.read_pydoc(directory)[1], 1000))
    full = [ids for ids in tokens if len(ids) == LENGTH]
    rows = np.array(full[: queries * len(towers)]).reshape(len(towers), queries, LENGTH)
    np.savez(directory / name, **dict(zip(towers, rows, strict=True)))


def read_texts(directory: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """What `write_texts` wrote."""
    with np.load(directory / name, allow_pickle=False) as file:
        return dict(file)


def _texts(directory: pathlib.Path, expanded: bool) -> dict[str, np.ndarray]:
    texts = read_texts(directory, "texts.npz")
    return texts if expanded else {name: texts[name] for name in TOWERS if name != "expansion"}


def start_ours(directory: pathlib.Path, expanded: bool) -> Running:
    """Step A's program, as the trainer sets it up."""
    from configs import base

    settings = base.get_config().contrastive
    settings.temperature, settings.query_weight, settings.normalize = TEMPERATURE, WEIGHT, "both"
    load = functools.partial(minilm.load, LENGTH)
    return step_a(load, settings, _texts(directory, expanded))


def step_a(load: Callable[[], Any], settings: Any, texts: Mapping[str, np.ndarray]) -> Running:
    """Step A's program for a batch of such texts, with the retriever and parameters of `load`."""
    import jax

    from expandr_jax.objectives.contrastive import contrastive_setup
    from expandr_jax.objectives.contrastive_batches import (
        ContrastiveExample,
        Passage,
        make_batch,
    )
    from expandr_jax.objectives.trained import divided
    from expandr_jax.sharding import device_put, make_mesh
    from expandr_jax.training.train_state import make_optimizer

    retriever, params = load()
    expanded = "expansion" in texts
    examples = [
        ContrastiveExample(
            query=query,
            expansions=[texts["expansion"][i]] if expanded else [],
            positive=Passage(texts["positive"][i], f"positive {i}"),
            negatives=[Passage(texts["negative"][i], f"negative {i}")],
        )
        for i, query in enumerate(texts["query"])
    ]
    pad_id = retriever.tokenizer.pad_token_id
    batch = make_batch(examples, pad_id, int(expanded), 1, longest=LENGTH)
    mesh = make_mesh()
    optimizer = make_optimizer(LEARNING_RATE, STEPS, clip_norm=CLIP_NORM)
    setup = contrastive_setup(mesh, retriever, params, settings, optimizer)
    held, trained = divided(retriever, params, seed=0)
    frozen = device_put(held, setup.frozen)
    state = setup.create(trained)
    del params, trained  # As in a run: the state is the only copy of what is trained.

    def update() -> dict[str, np.ndarray]:
        nonlocal state
        state, metrics = jax.block_until_ready(setup.step(state, *frozen, batch, None))
        return {name: np.array(metrics[name]) for name in ("loss", "grad_norm")}

    outputs = update()
    update()
    return Running(per_second(1, update), outputs, f"{mesh.size} devices")


def _torch_step(model, loss_of) -> Running:
    """Repeats forward, backward, clipping and AdamW."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)

    def update() -> dict[str, np.ndarray]:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimizer.step()
        schedule.step()
        return {"loss": loss.detach().numpy(), "grad_norm": norm.numpy()}

    outputs = update()
    update()
    return Running(per_second(1, update), outputs)


def start_torch(directory: pathlib.Path) -> Running:
    """Plain PyTorch; all 128 texts are one batch of the model."""
    import torch
    from transformers import AutoModel

    texts = _texts(directory, True)
    ids = torch.from_numpy(np.concatenate([texts[name] for name in TOWERS]))
    mask = torch.ones_like(ids)
    model = AutoModel.from_pretrained(minilm.path(), add_pooling_layer=False).eval()
    normalize = functools.partial(torch.nn.functional.normalize, dim=1)

    def loss() -> torch.Tensor:
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        query, positive, negative, expansion = normalize(hidden.mean(1)).split(QUERIES)
        mean = normalize(WEIGHT * query + (1 - WEIGHT) * expansion)
        scores = mean @ torch.cat([positive, negative]).T / TEMPERATURE
        return torch.nn.functional.cross_entropy(scores, torch.arange(QUERIES))

    return _torch_step(model, loss)


def start_sentence_transformers(directory: pathlib.Path) -> Running:
    """sentence-transformers' model and loss on queries, positives and negatives."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(minilm.path(), device="cpu").eval()
    columns = [torch.from_numpy(ids) for ids in _texts(directory, False).values()]
    loss = MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)

    def loss_of() -> torch.Tensor:
        # The model writes its outputs into what it is given.
        features = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in columns]
        return loss(features, torch.arange(QUERIES))

    return _torch_step(model, loss_of)


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """Losses and norms of the gradients are equal."""
    said = check_close(ours["loss"], theirs["loss"], 1e-4, "losses")
    norms = [side["grad_norm"] / theirs["grad_norm"] for side in (ours, theirs)]
    return f"{said}, {check_close(*norms, 1e-4, 'norms of the gradient')}"


def flops(directory: pathlib.Path, expanded: bool) -> float:
    """Operations of a step: the forward pass, and twice as many backward; the loss has few more."""
    return 3 * minilm.forward_flops([LENGTH] * QUERIES * (4 if expanded else 3))


ROWS = tuple(
    Comparison(
        name=f"contrastive step, {queries} queries",
        unit="steps/s",
        peer_name=packages[0],
        packages=packages,
        ours=functools.partial(start_ours, expanded=queries == "expanded"),
        peer=peer,
        check=check,
        flops=functools.partial(flops, expanded=queries == "expanded"),
    )
    for queries, packages, peer in (
        ("expanded", minilm.PACKAGES, start_torch),
        ("plain", ("sentence-transformers", *minilm.PACKAGES), start_sentence_transformers),
    )
)
