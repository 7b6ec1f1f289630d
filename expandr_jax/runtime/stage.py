"""Where a stage of training is recorded and kept."""

import dataclasses
import pathlib

from etils import epath

from expandr_jax.runtime.telemetry import TrainingLog


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A stage that trains, as whoever trains it has to know it.

    Attributes:
        log: Where its steps are recorded.
        checkpoints: The directory of its checkpoints.
        journal: The file of its evaluations on dev.
        keep: How many checkpoints stay.
    """

    log: TrainingLog
    checkpoints: epath.Path
    journal: pathlib.Path
    keep: int

    @property
    def best(self) -> epath.Path:
        """The directory of the weights that are best on dev."""
        return self.checkpoints.parent / f"{self.checkpoints.name}-best"
