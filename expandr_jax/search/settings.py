"""The settings of search; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.search.exact import ExactOptions
from expandr_jax.search.scann import ScannOptions
from expandr_jax.settings import choice


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """The section `search`."""

    backend: Annotated[str, choice(("auto", "scann", "exact"))]
    exact: ExactOptions
    scann: ScannOptions
