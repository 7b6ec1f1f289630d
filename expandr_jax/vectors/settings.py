"""The settings of the retriever; configs/base.py says what each means."""

import dataclasses
from typing import Annotated, get_args

from expandr_jax.models.pooling import Pooling
from expandr_jax.settings import WEIGHTS, ComputeType, Sha256, choice, count
from expandr_jax.vectors.stored import VECTOR_DTYPES


@dataclasses.dataclass(frozen=True)
class RetrieverSettings:
    """The section `retriever`."""

    source: str
    shape: str
    sha256: Sha256 | None
    pooling: Annotated[str, choice(get_args(Pooling), empty=True)]
    normalize: bool | None
    bidirectional: bool
    end_token: bool
    max_length: Annotated[int, count(1)]
    query_length: Annotated[int, count(0)]
    query_prompt: str | None
    document_prompt: str | None
    compute_dtype: ComputeType
    weights: Annotated[str, choice(WEIGHTS)]
    vectors: Annotated[str, choice(VECTOR_DTYPES)]
    tokens_per_batch: Annotated[int, count(1)]
