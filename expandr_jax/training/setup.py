"""What a trainer is made of, for training and for planning."""

import dataclasses

import jax.numpy as jnp
import ml_collections

from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive import ContrastiveConfig


def training_retriever(retriever: Retriever, config: ml_collections.ConfigDict) -> Retriever:
    """The retriever as the config's `contrastive` section trains it; its weights stay float32."""
    module = retriever.module.clone(dtype=jnp.dtype(config.compute_dtype), remat=config.remat)
    return dataclasses.replace(retriever, module=module)


def contrastive_config(config: ml_collections.ConfigDict, samples: int) -> ContrastiveConfig:
    """What the config's `contrastive` section compares; `samples`: expansions a query."""
    return ContrastiveConfig(
        temperature=config.temperature,
        query_weight=config.query_weight if samples else 1.0,
        normalize=config.normalize,
        learn_temperature=config.learn_temperature,
        symmetric=config.symmetric,
        info_nce_weight=config.info_nce_weight,
        margin_mse_weight=config.margin_mse_weight,
        kl_weight=config.kl_weight,
        teacher_temperature=config.teacher_temperature,
        invariance_weight=config.invariance_weight,
        dimensions=tuple(config.dimensions),
        micro_batch=config.micro_batch,
    )
