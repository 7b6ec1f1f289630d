"""The settings that all trainings have, and those of meshes; configs/base.py has their meaning."""

import dataclasses
from typing import Annotated

from expandr_jax.settings import MANY, Check, Positive, count, number
from expandr_jax.sharding import AXES


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Batches, updates and checkpoints: what every section that trains a model has."""

    epochs: Annotated[float, number(above=0, most=MANY)]
    batch_size: Annotated[int, count(1)]
    accumulation: Annotated[int, count(1, MANY)]
    learning_rate: Positive
    warmup_steps: Annotated[int, count(0)]
    clip_norm: Positive
    eval_every: Annotated[int, count(0)]
    save_every: Annotated[int, count(1)]


_SIZES = Check(
    "(data, fsdp, tensor), or () for mesh's",
    lambda value: (
        isinstance(value, tuple)
        and len(value) in (0, len(AXES))
        and all(type(size) is int for size in value)
    ),
)
Sizes = Annotated[tuple, _SIZES]


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The section `mesh`; whether sizes fit the devices is seen where these are known."""

    data: int
    fsdp: int
    tensor: int
    contrastive: Sizes
    encoding: Sizes
    sampling: Sizes
    dpo: Sizes
    workers: Annotated[int, count(0)]
