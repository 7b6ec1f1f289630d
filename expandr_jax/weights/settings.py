"""The settings of exports; configs/base.py says what each means."""

import dataclasses

from expandr_jax.settings import ComputeType


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The section `export`."""

    dtype: ComputeType
