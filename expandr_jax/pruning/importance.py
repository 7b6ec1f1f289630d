"""The importance of heads and channels: first-order Taylor, as in LLM-Pruner.

A weight's importance is how much the loss would change, to first order, without it: |w dL/dw|, with
the gradient over all examples. A head goes with all that only it uses, so importances are summed
over such a group.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from expandr_jax.losses.language import response_sums
from expandr_jax.models.decoder import Decoder, DecoderConfig
from expandr_jax.objectives.log_probs import packed_log_probs
from expandr_jax.objectives.objective import Objective, ObjectiveSettings

ImportanceLoss = Literal["likelihood", "step_b"]
# The axis of a layer's leaf that a group's key-value heads lie along, and that channels do.
HEADS = {
    "self_attn/q_proj/kernel": 1, "self_attn/k_proj/kernel": 1, "self_attn/v_proj/kernel": 1,
    "self_attn/o_proj/kernel": 0, "self_attn/q_proj/bias": 0, "self_attn/k_proj/bias": 0,
    "self_attn/v_proj/bias": 0,
}  # fmt: skip
CHANNELS = {"mlp/gate_proj/kernel": 1, "mlp/up_proj/kernel": 1, "mlp/down_proj/kernel": 0}


def pruning_loss(
    params: Mapping[str, Any],
    batch: Mapping[str, jax.Array],
    *,
    module: Decoder,
    objective: Objective,
    settings: ObjectiveSettings,
    loss: ImportanceLoss,
) -> jax.Array:
    """The mean loss of a packed batch, by the decoder's own parameters.

    "step_b" is the objective's, the model itself being the reference. "likelihood" is the mean
    negative log-likelihood of a token of the first response, which of pairs is the chosen one.
    """
    log_probs = packed_log_probs(
        module, {"params": params}, batch, responses=objective.responses, chunk=settings.chunk
    )
    sums, tokens = response_sums(log_probs, batch["responses"], objective.responses)
    if loss == "likelihood":
        return -jnp.mean(sums[:, 0] / tokens[:, 0])
    if objective.reference:
        batch = {**batch, "reference": jax.lax.stop_gradient(sums)}
    return jnp.mean(objective.losses(log_probs, batch, settings)[0])


def layer_gradients(
    loss_of: Callable[[Any, Any], jax.Array],
    params: Mapping[str, Any],
    batches: Iterable[Mapping[str, jax.Array]],
) -> dict[str, Any]:
    """The gradient of the layers' parameters, summed over batches: of the whole, not of examples.

    Args:
        loss_of: (parameters, batch) -> loss.
        params: The decoder's.
        batches: One at least.
    """
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}

    @jax.jit
    def gradient(layers: Any, rest: Any, batch: Any) -> Any:
        return jax.grad(lambda layers: loss_of({**rest, "layers": layers}, batch))(layers)

    total = None
    for batch in batches:
        found = gradient(params["layers"], rest, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    assert total is not None, "no batches"
    return total


def importances(
    layers: Mapping[str, Any], gradients: Mapping[str, Any], config: DecoderConfig
) -> tuple[jax.Array, jax.Array]:
    """Sums of |weight x gradient| over what goes together.

    Args:
        layers: The stacked parameters of all layers.
        gradients: A tree of the same form.
        config: The decoder's shape.

    Returns:
        Importances of key-value groups with their query heads, [layers, groups], and those of
        feed-forward channels, [layers, channels]; float32.
    """

    def of_units(axes: Mapping[str, int], count: int) -> jax.Array:
        total = jnp.zeros((config.num_layers, count), jnp.float32)
        for name, axis in axes.items():
            weight, slope = at(layers, name), at(gradients, name)
            if weight is None:
                continue
            product = jnp.abs(weight.astype(jnp.float32) * slope.astype(jnp.float32))
            moved = jnp.moveaxis(product, axis + 1, 1)
            total += moved.reshape(config.num_layers, count, -1).sum(axis=2)
        return total

    return of_units(HEADS, config.num_kv_heads), of_units(CHANNELS, config.mlp_dim)


def at(tree: Mapping[str, Any], name: str) -> Any | None:
    """The leaf at a path joined by "/"; None where there is none."""
    for key in name.split("/"):
        tree = tree.get(key)
        if tree is None:
            return None
    return tree


def drawn(config: DecoderConfig, seed: int) -> tuple[jax.Array, jax.Array]:
    """Random importances of the same form, as a baseline."""
    key = jax.random.key(seed)
    shapes = config.num_kv_heads, config.mlp_dim
    return tuple(
        jax.random.uniform(jax.random.fold_in(key, i), (config.num_layers, count))
        for i, count in enumerate(shapes)
    )
