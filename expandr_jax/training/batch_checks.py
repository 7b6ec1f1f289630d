"""Whether a step's batch fills the devices of its mesh: seen before hours of work, not after."""

import jax
import jax.numpy as jnp
import ml_collections

from expandr_jax.errors import UserError
from expandr_jax.pair import GeneratorModel, RetrieverModel
from expandr_jax.sharding import batch_divisor


def check_contrastive_batch(
    config: ml_collections.ConfigDict, models: RetrieverModel, queries: int
) -> None:
    """Refuses sizes of step A that the model, its mesh or the queries do not allow.

    Args:
        config: The config's `contrastive` section.
        models: The retriever and its mesh.
        queries: How many it is trained on.

    Raises:
        UserError: Naming the settings.
    """
    size, micro = config.batch_size, config.micro_batch
    devices = batch_divisor(models.contrastive_mesh)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = models.retriever_params
    width = jax.eval_shape(models.retriever.embed, params, token, token).shape[-1]
    if not all(1 <= dimension <= width for dimension in config.dimensions):
        raise UserError(
            f"contrastive.dimensions {tuple(config.dimensions)} must lie between 1 and {width}, "
            "the width of the vectors"
        )
    if queries < size:
        raise UserError(
            f"{queries} training queries do not fill one batch of {size}; lower "
            "contrastive.batch_size"
        )
    if size == 1 and not config.negatives:
        raise UserError(
            "contrastive.batch_size is 1 and contrastive.negatives 0, so that a query's document "
            "is compared with no other; raise one of them"
        )
    if size % devices or (micro and (size % micro or micro % devices)):
        raise UserError(
            f"contrastive.batch_size {size} and micro_batch {micro} do not fit: the latter must "
            f"divide the former, and {devices} (the mesh's data and fsdp) must divide both"
        )


def check_dpo_batch(config: ml_collections.ConfigDict, models: GeneratorModel) -> None:
    """Refuses a batch of step B that its mesh cannot divide.

    Args:
        config: The config's `dpo` section.
        models: The generator's mesh.

    Raises:
        UserError: Naming the setting.
    """
    devices = batch_divisor(models.dpo_mesh)
    if config.batch_size % devices:
        raise UserError(
            f"dpo.batch_size {config.batch_size} must be a multiple of {devices} (the mesh's data "
            "and fsdp)"
        )
