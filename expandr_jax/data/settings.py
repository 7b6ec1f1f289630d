"""The settings of a run's data; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.data.pydoc import Shares
from expandr_jax.settings import count


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
