"""What on-policy training refuses before hours of work: sizes that do not fit."""

from jax.sharding import Mesh

from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.objectives.coaugmentation import check_documents
from expandr_jax.objectives.policy import micro_rows
from expandr_jax.objectives.settings import GrpoSettings


def check_policy(settings: GrpoSettings, section: str, data: TrainingData, mesh: Mesh) -> None:
    """Refuses settings, which the config calls `section`, that the data or the mesh do not allow.

    Raises:
        UserError: There are too few queries or documents, or the mesh cannot divide a step.
    """
    micro_rows(settings, section, mesh)
    if settings.queries > (queries := len(data.generator_train)):
        raise UserError(
            f"{section}.queries {settings.queries}: there are {queries} queries to train the "
            "generator with"
        )
    check_documents(settings, section, data)
