"""Whether a step's batch fills the devices of its mesh: seen before hours of work, not after."""

import ml_collections

from expandr_jax.errors import UserError
from expandr_jax.pair import GeneratorModel
from expandr_jax.sharding import batch_divisor


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
