"""A trainer set up in one place.

A run calls its step with arrays; `train.plan` compiles the same for other machines, from shapes
alone.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.sharding import (
    batch_divisor,
    batch_sharding,
    on_mesh,
    replicated,
    with_shardings,
)
from expandr_jax.training.settings import TrainingSettings
from expandr_jax.training.train_state import TrainState, make_optimizer

Program = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """A compiled step and the state that it takes.

    Attributes:
        shardings: Where each part of the state lies.
        step: (state, ..., batch, key) -> (state, metrics); the state is donated.
        create: What is trained, anywhere -> the state before any training, where that lies.
        frozen: Where each thing lies that the step takes between the state and the batch.
    """

    shardings: TrainState
    step: Program
    create: Callable[[Any], TrainState]
    frozen: tuple[Any, ...] = ()

    def shapes(self, trained: Any) -> TrainState:
        """The state of what is trained, as shapes with their shardings."""
        # Without shardings: device_put over several processes takes arrays, and these are shapes.
        create = functools.partial(self.create, shardings=None)
        return with_shardings(jax.eval_shape(create, trained), self.shardings)


def set_up(
    mesh: Mesh,
    step: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    trained: Any,
    shardings: Any,
    optimizer: optax.GradientTransformation,
    *frozen: Any,
) -> TrainingSetup:
    """Compiles a step for a mesh; the program is made at its first call.

    Args:
        mesh: The devices.
        step: (state, ..., batch, key, *, optimizer) -> (state, metrics).
        trained, shardings: Shapes of the parameters that are trained, and where they lie.
        optimizer: From `make_optimizer`.
        *frozen: Shardings of what the step takes between the state and the batch.
    """
    state = TrainState.shardings(mesh, shardings, trained, optimizer)
    program = jax.jit(
        on_mesh(mesh, functools.partial(step, optimizer=optimizer)),
        in_shardings=(state, *frozen, batch_sharding(mesh), None),
        out_shardings=(state, replicated(mesh)),
        donate_argnums=0,
    )
    create = functools.partial(TrainState.create, optimizer=optimizer, shardings=state)
    return TrainingSetup(state, program, create, frozen)


def count_updates(settings: TrainingSettings, batches: int) -> int:
    """Updates of a round, at least one, whose epochs have so many batches."""
    return max(1, round(settings.epochs * batches / settings.accumulation))


def section_optimizer(settings: TrainingSettings, updates: int) -> optax.GradientTransformation:
    """The optimizer of a round of so many updates, at most half of which are the warm-up."""
    return make_optimizer(
        settings.learning_rate,
        updates,
        warmup=min(settings.warmup_steps, updates // 2),
        clip_norm=settings.clip_norm,
        weight_decay=settings.weight_decay,
        accumulation=settings.accumulation,
    )


def check_batch_size(name: str, size: int, mesh: Mesh) -> None:
    """Raises UserError where a mesh cannot divide a batch; `name`: the setting, for the message."""
    if size % batch_divisor(mesh):
        raise UserError(
            f"{name} {size} must be a multiple of {batch_divisor(mesh)} (the mesh's data and fsdp)"
        )
