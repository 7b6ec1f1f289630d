"""The settings of a run's data; configs/base.py says what each means."""

import dataclasses
import math
from typing import Annotated

from expandr_jax.data.pydoc import Shares
from expandr_jax.errors import UserError
from expandr_jax.settings import Complaints, at_least_one, count


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The section `data`; most of it is checked against the files, where these are read."""

    kind: str
    path: str
    url: str
    sha256: str
    md5: str
    cache: str
    tests: tuple
    weights: tuple
    prepared: str
    dev: str
    on_bad: str
    packages: tuple
    min_pairs: Annotated[int, count(0)]
    shares: Shares
    max_retriever_train: Annotated[int, count(0)]
    max_generator_train: Annotated[int, count(0)]
    max_dev: Annotated[int, count(0)]
    max_test: Annotated[int, count(0)]

    def refused(self) -> Complaints:
        """Shares that leave no query to train by or, of a harvest, are more or less than all."""
        yield from at_least_one("data", self, ("shares.retriever_train", "shares.generator_train"))
        total = math.fsum(dataclasses.astuple(self.shares))
        if self.kind == "pydoc" and abs(total - 1) > 1e-9:
            raise UserError(f"data.shares: its four parts add up to {total:.6g}; expected 1")
