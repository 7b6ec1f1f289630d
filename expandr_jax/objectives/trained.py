"""The trained part of a retriever: all of its weights, or an adapter on frozen ones.

Frozen and adapted, the weights are never merged: an encoder takes them side by side. All retrievers
of a run then share one copy of the base, whatever their number, which may be in int8, too; what
that costs is two thin products beside each of the adapted ones.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from expandr_jax.models.lora import init_lora, split_adapter, with_adapter
from expandr_jax.models.pooling import dense_name
from expandr_jax.models.retriever import Retriever
from expandr_jax.weights.trees import model_shardings

if TYPE_CHECKING:
    from expandr_jax.objectives.settings import ContrastiveSettings

Frozen = tuple[Mapping[str, Any], ...]  # The base where an adapter is trained; else nothing.


def training_retriever(retriever: Retriever, settings: "ContrastiveSettings") -> Retriever:
    """The retriever as the config's section `contrastive` trains it.

    What is trained stays float32. Where that is an adapter with dropout of its own, the module's
    rates are 0 unless the section wants them, too.
    """
    module = retriever.module.clone(dtype=jnp.dtype(settings.compute_dtype), remat=settings.remat)
    if module.lora is not None and not settings.dropout:
        names = (field.name for field in dataclasses.fields(module.config))
        rates = dict.fromkeys((name for name in names if name.endswith("dropout")), 0.0)
        module = module.clone(config=dataclasses.replace(module.config, **rates))
    return dataclasses.replace(retriever, module=module)


def drops_out(retriever: Retriever, settings: "ContrastiveSettings") -> bool:
    """Whether training has dropout."""
    lora = retriever.module.lora
    return settings.dropout or (lora is not None and lora.dropout > 0)


def with_temperature(params: Any, settings: "ContrastiveSettings") -> Any:
    """What is trained: the retriever's parameters; where the temperature is learned as well,
    {"retriever": these, "log_temperature": scalar}."""
    if not settings.learn_temperature:
        return params
    return {"retriever": params, "log_temperature": jnp.log(jnp.float32(settings.temperature))}


def split_temperature(params: Any, settings: "ContrastiveSettings") -> tuple[Any, jax.Array | None]:
    """The retriever's parameters and the logarithm of the temperature, None where it is fixed."""
    if not settings.learn_temperature:
        return params, None
    return params["retriever"], params["log_temperature"]


def divided(retriever: Retriever, params: Mapping[str, Any], seed: int) -> tuple[Frozen, Any]:
    """A retriever's parameters, or their shapes: what stays as it is, and what is trained.

    An adapter that there is not yet is made, by the seed. `joined` puts both together again.

    Raises:
        UserError: The adapter's settings do not fit the model.
    """
    lora = retriever.module.lora
    if lora is None:
        return (), params
    base, adapter = split_adapter(params)
    if adapter is None:
        after = {dense_name(number) for number in range(len(retriever.dense))}
        own = {name: tree for name, tree in base.items() if name not in after}
        adapter = init_lora(jax.random.key(seed), own, lora, "contrastive.lora")
    return (base,), adapter


def shardings_of(
    mesh: Mesh, retriever: Retriever, params: Mapping[str, Any]
) -> tuple[tuple[Any, ...], Any, Any]:
    """Shardings of the two parts of `divided` on a mesh.

    Returns:
        Shardings of what is frozen; shapes of what is trained; its shardings.
    """
    frozen, trained = jax.eval_shape(lambda params: divided(retriever, params, 0), params)
    whole = model_shardings(mesh, retriever.module, joined(frozen, trained))
    if not frozen:
        return (), trained, whole
    base, adapter = split_adapter(whole)
    return (base,), trained, adapter


def with_frozen_base(step: Callable[..., Any]) -> Callable[..., Any]:
    """(state, base, batch, key) of a step (state, batch, key) that takes `frozen`, too."""

    def of_adapter(state: Any, base: Any, batch: Any, key: Any = None, **settings: Any) -> Any:
        return step(state, batch, key, frozen=(base,), **settings)

    return of_adapter


def joined(frozen: Frozen, trained: Any) -> Any:
    """A retriever's parameters of the two parts that `divided` gives."""
    return with_adapter(*frozen, trained) if frozen else trained
