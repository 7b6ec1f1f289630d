"""What step A refuses before it begins: sizes that do not fit, examples that teach nothing."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.losses.contrastive import LEARNED_FROM_A_TEACHER, loss_weights
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.contrastive_batches import ContrastiveExample
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.sharding import batch_divisor


def check_contrastive_batch(
    settings: ContrastiveSettings, retriever: Retriever, params: Any, mesh: Mesh, queries: int
) -> None:
    """Refuses sizes that the model, its mesh or the number of training queries do not allow.

    Raises UserError, which names the settings; `params` may be shapes.
    """
    size, micro = settings.batch_size, settings.micro_batch
    devices = batch_divisor(mesh)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    width = jax.eval_shape(retriever.embed, params, token, token).shape[-1]
    if not all(1 <= dimension <= width for dimension in settings.dimensions):
        raise UserError(
            f"contrastive.dimensions {tuple(settings.dimensions)} must lie between 1 and {width}, "
            "the width of the vectors"
        )
    if queries < size:
        raise UserError(
            f"{queries} training queries do not fill one batch of {size}; lower "
            "contrastive.batch_size"
        )
    if size == 1 and not settings.negatives:
        raise UserError(
            "contrastive.batch_size is 1 and contrastive.negatives 0, so that a query's document "
            "is compared with no other; raise one of them"
        )
    if size % devices or (micro and (size % micro or micro % devices)):
        raise UserError(
            f"contrastive.batch_size {size} and micro_batch {micro} do not fit: the latter must "
            f"divide the former, and {devices} (the mesh's data and fsdp) must divide both"
        )


def check_contrastive_examples(
    settings: ContrastiveSettings,
    examples: Sequence[ContrastiveExample],
    samples: int,
    names: Sequence[str],
) -> None:
    """Refuses examples, with so many expansions a query, that do not have what step A is to learn.

    Raises UserError, which names the setting, and the query where there is one.
    """
    weights = loss_weights(settings)
    expanded = samples and settings.plain_share < 1 and any(e.expansions for e in examples)
    if [*weights] == ["invariance"] and not expanded:
        raise UserError(
            "contrastive.invariance_weight alone is above 0, but no training query is expanded: "
            "there is nothing to learn"
        )
    if settings.negatives and not any(e.negatives for e in examples):
        raise UserError(
            f"contrastive.negatives is {settings.negatives}, but no training query has a negative"
        )
    if any(name in weights for name in LEARNED_FROM_A_TEACHER):
        if not settings.negatives:
            raise UserError("a teacher's scores need contrastive.negatives above 0")
        for name, example in zip(names, examples, strict=True):
            passages = example.positive, *example.negatives, *example.other_positives
            if any(passage.score is None for passage in passages):
                raise UserError(
                    f"training query {name} has no teacher's scores; without them set "
                    "contrastive.margin_mse_weight and kl_weight to 0"
                )
    if settings.curriculum:
        for name, example in zip(names, examples, strict=True):
            if example.ease is None:
                raise UserError(
                    f"training query {name} has neither a margin nor teacher_scores of a positive "
                    "and a negative; without them set contrastive.curriculum to False"
                )
