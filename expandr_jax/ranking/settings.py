"""The settings of the evaluation; configs/base.py says what each means."""

import dataclasses
from typing import Annotated

from expandr_jax.ranking.listwise import ListwiseSettings
from expandr_jax.ranking.rerank import RerankSettings
from expandr_jax.settings import MANY, SHARE, TEXT, count, several


@dataclasses.dataclass(frozen=True)
class SpladeSettings:
    """The section `evaluation.splade`."""

    source: str
    max_length: Annotated[int, count(1)]


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """The section `evaluation`."""

    systems: Annotated[tuple[str, ...], several(TEXT)]
    query_weights: Annotated[tuple[float, ...], several(SHARE)]
    samples: Annotated[tuple[int, ...], several(count(1, MANY))]
    fusion_steps: Annotated[int, count(0, 100)]
    depth: Annotated[int, count(1)]
    sample_depth: Annotated[int, count(1)]
    drop_identical_ids: bool
    rerank: RerankSettings
    listwise: ListwiseSettings
    splade: SpladeSettings
