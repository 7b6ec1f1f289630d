"""Trains the retriever contrastively, on plain or on expanded queries."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from expandr_jax.checkpoint import Checkpoints
from expandr_jax.contrastive import (
    ContrastiveConfig,
    ContrastiveExample,
    contrastive_step,
    make_batch,
)
from expandr_jax.data.batches import batch_indices
from expandr_jax.data.records import hash_json
from expandr_jax.sharding import batch_sharding
from expandr_jax.train_state import OptimizerConfig, TrainState, make_optimizer
from train.loop import fit
from train.models import Models
from train.run import Run


def train_retriever(
    run: Run,
    models: Models,
    params: Any,
    examples: Sequence[ContrastiveExample],
    config: ml_collections.ConfigDict,
    *,
    phase: str,
    round_: int,
    samples: int,
) -> Any:
    """One round of step A.

    Args:
        run: The workdir; checkpoints go to checkpoints/PHASE.
        models: The retriever's module and mesh.
        params: Weights to start from.
        examples: Training queries with their documents and expansions.
        config: The config's `contrastive` section.
        phase: "retriever", or "fine-tuned" for the baseline on plain queries.
        round_: Counts from 0.
        samples: Expansions a query; 0 trains on plain queries.

    Returns:
        The trained parameters.
    """
    steps = max(1, round(config.epochs * (len(examples) // config.batch_size)))
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=config.learning_rate,
            total_steps=steps,
            warmup_steps=min(config.warmup_steps, steps // 2),
            clip_norm=config.clip_norm,
            weight_decay=config.weight_decay,
        )
    )
    # Training may compute in another type than encoding does; the weights are float32 in both.
    module = models.retriever.module.clone(dtype=jnp.dtype(config.compute_dtype))
    rows = batch_sharding(models.mesh)
    step_fn = jax.jit(
        functools.partial(
            contrastive_step,
            retriever=dataclasses.replace(models.retriever, module=module),
            optimizer=optimizer,
            config=ContrastiveConfig(
                temperature=config.temperature,
                query_weight=config.query_weight if samples else 1.0,
                normalize=config.normalize,
            ),
        ),
        in_shardings=(None, rows),
        donate_argnums=0,
    )
    seed, pad_id = run.config.seed, models.retriever.tokenizer.pad_token_id

    def batch(step: int) -> dict[str, Any]:
        chosen = batch_indices(seed, round_ * steps + step, len(examples), config.batch_size)
        return make_batch([examples[i] for i in chosen], pad_id, samples)

    identity = {
        "model": models.retriever_hash,
        "settings": hash_json(config.to_dict()),
        "examples": hash_json([[e.positive_text, list(e.query)] for e in examples]),
        "steps": steps,
    }
    checkpoints = Checkpoints(
        run.path("checkpoints", phase), identity, keep=run.config.keep, keep_period=steps
    )
    state = fit(
        run,
        phase,
        round_,
        TrainState.create(params, optimizer),
        step_fn,
        batch,
        first_step=round_ * steps,
        steps=steps,
        checkpoints=checkpoints,
        save_every=config.save_every,
    )
    return state.params
