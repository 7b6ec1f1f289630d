"""The settings of logs; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.settings import Positive, count


@dataclasses.dataclass(frozen=True)
class LogSettings:
    """The section `log`."""

    peak_flops: Positive | None
    wandb: str
    profile_steps: Annotated[int, count(0)]
