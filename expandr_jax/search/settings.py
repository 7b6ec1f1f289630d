"""The settings of search; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.search.exact import ExactOptions
from expandr_jax.search.scann import ScannOptions
from expandr_jax.settings import choice

EVALUATIONS = ("exact", "index")  # What rankings of results are searched by.


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """The section `search`."""

    backend: Annotated[str, choice(("auto", "scann", "exact"))]
    evaluation: Annotated[str, choice(EVALUATIONS)]
    exact: ExactOptions
    scann: ScannOptions
