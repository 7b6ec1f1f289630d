"""The training state: parameters, optimizer state and step, and how an update changes it."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from expandr_jax.sharding import device_put, replicated

# What is not decayed, by the names that modules give their parameters: scales, biases of all kinds
# and single numbers, as in transformers' Trainer, which decays embeddings. Shapes would not tell:
# layers are stacked, so that a norm's scale is a matrix.
UNDECAYED = ("bias", "relative_bias", "scale", "kernel_scale", "log_temperature")


def decayed(params: Any) -> Any:
    """Whether weight decay is for each parameter of a tree: a bool a leaf."""

    def by_name(path: tuple[Any, ...], _: Any) -> bool:
        return not path or path[-1].key not in UNDECAYED

    return jax.tree_util.tree_map_with_path(by_name, params)


def make_schedule(
    learning_rate: float, updates: int, warmup: int = 0, *, constant: bool = False
) -> optax.Schedule:
    """Linear rise over the warm-up, then linear decay to zero, or none; counted in updates."""
    last = learning_rate if constant else 0.0
    decay = optax.linear_schedule(learning_rate, last, max(1, updates - warmup))
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(
    learning_rate: float,
    updates: int,
    *,
    warmup: int = 0,
    clip_norm: float = 1.0,
    weight_decay: float = 0.0,
    accumulation: int = 1,
    constant: bool = False,
) -> optax.GradientTransformation:
    """Clipping, then AdamW with a linear schedule, as both of the paper's trainers have it.

    Args:
        learning_rate: Peak rate.
        updates: The rate falls linearly and would be 0 after the last of them.
        warmup: Updates from 0 to the peak; the paper has none for DPO.
        clip_norm: Greatest global norm of the gradient.
        weight_decay: Decoupled, on what is `decayed`.
        accumulation: Micro-batches per update.
        constant: The rate stays at its peak.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            make_schedule(learning_rate, updates, warmup, constant=constant),
            weight_decay=weight_decay,
            mask=decayed,
        ),
    )
    if accumulation > 1:
        return optax.MultiSteps(optimizer, accumulation).gradient_transformation()
    return optimizer


@flax.struct.dataclass
class TrainState:
    """Trainable parameters and the optimizer's state; frozen parameters live elsewhere.

    Attributes:
        step: Micro-batches seen, int32 scalar.
        params: The trainable tree.
        opt_state: optax state of the same structure.
    """

    step: jax.Array
    params: Any
    opt_state: Any

    @classmethod
    def create(
        cls,
        params: Any,
        optimizer: optax.GradientTransformation,
        shardings: "TrainState | None" = None,
    ) -> "TrainState":
        """The state before any training, made where `shardings` says."""

        def new(params: Any) -> "TrainState":
            # `jnp.array` copies: the state is donated to each step, the caller's tree must survive.
            params = jax.tree.map(jnp.array, params)
            return cls(jnp.zeros((), jnp.int32), params, optimizer.init(params))

        if shardings is None:
            return new(params)
        params = device_put(params, shardings.params)
        return jax.jit(new, out_shardings=shardings)(params)

    @classmethod
    def shardings(
        cls, mesh: Mesh, params: Any, shapes: Any, optimizer: optax.GradientTransformation
    ) -> "TrainState":
        """Where `create` belongs: what the optimizer keeps of a parameter lies where that lies.

        Counters, the step among them, are on all of the mesh. `params` are the shardings of the
        trainable parameters, `shapes` themselves or their shapes.
        """
        everywhere = replicated(mesh)
        opt_state = jax.eval_shape(optimizer.init, shapes)
        sharded = optax.tree.map_params(
            optimizer,
            lambda _, sharding: sharding,
            opt_state,
            params,
            transform_non_params=lambda _: everywhere,
        )
        return cls(everywhere, params, sharded)

    def apply(
        self,
        grads: Any,
        optimizer: optax.GradientTransformation,
        rate: jax.Array | None = None,
    ) -> "TrainState":
        """The state after an update, which `rate` scales, where it is given."""
        updates, opt_state = optimizer.update(grads, self.opt_state, self.params)
        if rate is not None:
            updates = jax.tree.map(lambda update: rate * update, updates)
        return TrainState(self.step + 1, optax.apply_updates(self.params, updates), opt_state)
