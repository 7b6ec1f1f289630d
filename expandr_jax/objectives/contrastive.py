"""Step A: the retriever learns from expanded queries, contrastively (ExpandR, arXiv 2502.17057).

With `micro_batch` set, a batch of any size takes the memory of one micro-batch and of its vectors
(GradCache, Gao et al., arXiv 2101.06983): all vectors first, without what their gradients need,
then the loss's gradient with respect to them, then each micro-batch once more, to carry that
gradient on to the parameters. The loss itself goes over the queries in parts, whose scores against
all passages are in memory one part at a time.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from expandr_jax.losses.contrastive import (
    CONTRASTIVE_LOSSES,
    ContrastiveLossSettings,
    Vectors,
    flops,
    info_nce,
    loss_weights,
    matryoshka,
    same_text,
)
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.llm_ql import LIKELIHOOD_ARRAYS, query_losses
from expandr_jax.objectives.trained import (
    Frozen,
    joined,
    shardings_of,
    split_temperature,
    training_retriever,
    with_frozen_base,
    with_temperature,
)
from expandr_jax.settings import Share, choice, count, several
from expandr_jax.sharding import constrain, replicated
from expandr_jax.training.setup import TrainingSetup, set_up
from expandr_jax.training.train_state import TrainState
from expandr_jax.vectors.query import NORMALIZE, Normalize, expanded_query

if TYPE_CHECKING:
    from expandr_jax.objectives.settings import ContrastiveSettings

# Arrays of a batch with a row a query that the loss needs.
BY_QUERY = ("relevant", "positive_texts", "given", "teacher_scores")
SCORE_BYTES = 2**28  # Scores that are in memory at once, where there are micro-batches.
TOWERS = ("query", "positive", "negative", "expansion")  # Kinds of text that a batch has.
LEAST_TEMPERATURE = 0.01  # A learned temperature does not fall below it, as CLIP's does not.
LEAST_LOG_TEMPERATURE = np.float32(np.log(LEAST_TEMPERATURE))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ContrastiveLossSettings):
    """What a step compares, and how. A config's section `contrastive` is one."""

    query_weight: Share = 0.5
    normalize: Annotated[str, choice(get_args(Normalize))] = NORMALIZE
    learn_temperature: bool = False
    dimensions: Annotated[tuple[int, ...], several(count(1), least=0)] = ()
    micro_batch: Annotated[int, count(0)] = 0
    query_likelihood_mask: bool = True
    query_likelihood_corruption: Share = 0.6


def contrastive_setup(
    mesh: Mesh,
    retriever: Retriever,
    params: Any,
    settings: "ContrastiveSettings",
    optimizer: optax.GradientTransformation,
) -> TrainingSetup:
    """Sets step A up, as the config's section `contrastive` has it.

    Its step is (state, *frozen, batch, key) -> (state, metrics), where what is frozen is as
    `divided` has it. The retriever is given as it encodes, with its parameters or their shapes.
    """
    retriever = training_retriever(retriever, settings)
    held, trained, shardings = shardings_of(mesh, retriever, params)
    if settings.learn_temperature:
        shardings = {"retriever": shardings, "log_temperature": replicated(mesh)}
    trained = jax.eval_shape(lambda params: with_temperature(params, settings), trained)
    step = with_frozen_base(contrastive_step) if held else contrastive_step
    step = functools.partial(step, retriever=retriever, config=settings)
    return set_up(mesh, step, trained, shardings, optimizer, *held)


def contrastive_loss(
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    retriever: Retriever,
    config: ContrastiveConfig,
    dropout_key: jax.Array | None = None,
    frozen: Frozen = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of a batch and its metrics.

    Args:
        params: As `with_temperature` has them.
        batch: From `make_batch`.
        retriever, config: What embeds the texts, and what is compared.
        dropout_key: Turns the module's dropout on.
        frozen: What `params` are an adapter of, if they are one.

    Returns:
        The loss; "in_batch_accuracy", the share of queries whose own document beats all others
        together; "temperature" where it is learned; "query_likelihood", in nats a token, where it
        is weighed.
    """
    model, log_temperature = split_temperature(params, config)
    model = joined(frozen, model)
    vectors = _embed_batch(model, batch, retriever, config, dropout_key)
    loss, metrics = _loss_of_vectors(vectors, log_temperature, batch, config)
    if weight := config.query_likelihood_weight:
        likelihood = _likelihood(model, *_read(batch, dropout_key), retriever, config)
        loss, metrics = loss + weight * likelihood, {**metrics, "query_likelihood": likelihood}
    return loss, metrics


def contrastive_gradients(
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    retriever: Retriever,
    config: ContrastiveConfig,
    dropout_key: jax.Array | None = None,
    frozen: Frozen = (),
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
    """((loss, metrics), gradients) of `contrastive_loss`, by micro-batches where the config asks.

    Both passes over a micro-batch drop the same.
    """
    if not config.micro_batch:
        return jax.value_and_grad(contrastive_loss, has_aux=True)(
            params,
            batch,
            retriever=retriever,
            config=config,
            dropout_key=dropout_key,
            frozen=frozen,
        )
    model, log_temperature = split_temperature(params, config)
    vectors = _embed_batch(joined(frozen, model), batch, retriever, config, dropout_key)
    result, (cotangents, log_temperature_grad) = jax.value_and_grad(
        _loss_of_vectors, argnums=(0, 1), has_aux=True
    )(vectors, log_temperature, batch, config)
    grads = jax.tree.map(jnp.zeros_like, model)

    def add(total, part):
        chunk, vector_grads = part
        _, pull_back = jax.vjp(lambda m: _embed_chunk(joined(frozen, m), chunk, retriever), model)
        return jax.tree.map(jnp.add, total, pull_back(vector_grads)[0]), None

    for towers in _by_length(batch):
        chunks = _join(_chunks(batch, t, config.micro_batch, dropout_key) for t in towers)
        vector_grads = _join(_split_rows(cotangents[t], config.micro_batch) for t in towers)
        grads, _ = jax.lax.scan(add, grads, (chunks, vector_grads))
    loss, metrics = result
    if weight := config.query_likelihood_weight:
        rows, key = _read(batch, dropout_key)
        parts = jax.tree.map(lambda x: _split_rows(x, config.micro_batch), rows)
        count = len(parts["query_ids"])
        keys = None if key is None else jax.random.split(key, count)

        def add_likelihood(total, part):
            of_part = jax.value_and_grad(
                lambda m: _likelihood(joined(frozen, m), *part, retriever, config) / count
            )(model)
            return jax.tree.map(jnp.add, total, of_part), None

        none = jnp.float32(0), jax.tree.map(jnp.zeros_like, model)
        (likelihood, more), _ = jax.lax.scan(add_likelihood, none, (parts, keys))
        grads = jax.tree.map(lambda a, b: a + weight * b, grads, more)
        loss, metrics = loss + weight * likelihood, {**metrics, "query_likelihood": likelihood}
    if config.learn_temperature:
        grads = {"retriever": grads, "log_temperature": log_temperature_grad}
    return (loss, metrics), grads


def _read(
    batch: Mapping[str, jax.Array], key: jax.Array | None
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """What query likelihood reads of a batch, words uncorrupted where none are, and its key."""
    rows = {"corrupted_ids": batch["positive_ids"], **batch}
    key = None if key is None else jax.random.fold_in(key, len(TOWERS))
    return {name: rows[name] for name in LIKELIHOOD_ARRAYS}, key


def _likelihood(
    model: Any,
    rows: Mapping[str, jax.Array],
    key: jax.Array | None,
    retriever: Retriever,
    config: ContrastiveConfig,
) -> jax.Array:
    blocked = config.query_likelihood_mask
    own = query_losses(model, rows, retriever=retriever, blocked=blocked, dropout_key=key)
    return jnp.mean(own)


def contrastive_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    retriever: Retriever,
    config: ContrastiveConfig,
    optimizer: optax.GradientTransformation,
    frozen: Frozen = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the retriever: (state, batch) -> (state, metrics).

    Dropout, if a key turns it on, is drawn from (key, step).
    """
    (loss, metrics), grads = contrastive_gradients(
        state.params,
        batch,
        retriever=retriever,
        config=config,
        dropout_key=None if key is None else jax.random.fold_in(key, state.step),
        frozen=frozen,
    )
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    state = state.apply(grads, optimizer)
    if config.learn_temperature:
        # The parameter, and not what is made of it, whose gradient would be 0 there for ever.
        floored = jnp.maximum(state.params["log_temperature"], LEAST_LOG_TEMPERATURE)
        state = state.replace(params={**state.params, "log_temperature": floored})
    return state, metrics


def _loss_of_vectors(
    vectors: Mapping[str, jax.Array],
    log_temperature: jax.Array | None,
    batch: Mapping[str, jax.Array],
    config: ContrastiveConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    compared = Vectors(vectors["query"], vectors["positive"], vectors.get("negative"))
    if "present" in batch:
        expand = functools.partial(
            expanded_query,
            compared.query,
            vectors["expansion"].reshape(*batch["present"].shape, -1),
            query_weight=config.query_weight,
            normalize=config.normalize,
        )
        plain = expand(jnp.zeros_like(batch["present"])) if config.invariance_weight else None
        compared = compared.replace(query=expand(batch["present"]), plain=plain)
    temperature, metrics = config.temperature, {}
    if log_temperature is not None:
        # A checkpoint of older code may lie below the floor; its gradient still leads out.
        below = jnp.maximum(LEAST_LOG_TEMPERATURE - log_temperature, 0.0)
        temperature = jnp.exp(log_temperature + jax.lax.stop_gradient(below))
        metrics["temperature"] = temperature

    texts, real = batch["positive_texts"], None  # Which passages are there, None: all.
    if compared.negative is not None:
        texts = jnp.concatenate([texts, batch["negative_texts"]])
        given = jnp.ones(len(batch["given"]), bool), batch["given"][:, 1:].reshape(-1)
        real = jnp.concatenate(given)

    def of_queries(part: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        """[rows] losses of some queries, or all, and whether their own documents beat all others
        together."""
        rows, negative = part.get("rows"), compared.negative
        masks = {"excluded": same_text(texts, part["relevant"])}
        if negative is not None:  # What stands where a query has no more negatives is excluded.
            masks["excluded"] |= ~real
        if rows is not None and config.symmetric:
            masks["excluded_queries"] = same_text(part["positive_texts"], batch["relevant"]).T
        some = compared.replace(query=part["query"], plain=part.get("plain"))

        def losses(vectors: Vectors) -> jax.Array:
            return sum(
                weight * CONTRASTIVE_LOSSES[name](vectors, part | masks, temperature, config)
                for name, weight in loss_weights(config).items()
            )

        loss = matryoshka(losses, config.dimensions, some) if config.dimensions else losses(some)
        whole = some.query, some.positive, some.negative
        own = info_nce(*whole, temperature=temperature, excluded=masks["excluded"], rows=rows)
        # A loss below log 2 means that the document beats all others together.
        return loss, jax.lax.stop_gradient(own) < jnp.log(2.0)

    queries = {"query": compared.query, "plain": compared.plain}
    queries |= {name: batch.get(name) for name in BY_QUERY}
    queries = {name: value for name, value in queries.items() if value is not None}
    size = _queries_at_once(config.micro_batch, len(compared.query), len(texts))
    if size == len(compared.query):
        loss, beats = of_queries(queries)
    else:
        # Each device has the vectors of all once, and not again for each part.
        compared = jax.tree.map(lambda x: constrain(x, (None, None)), compared)
        compared = compared.replace(everyone=compared.query if config.symmetric else None)
        queries["rows"] = jnp.arange(len(compared.query))
        parts = jax.tree.map(lambda x: _split_rows(x, size), queries)
        loss, beats = jax.tree.map(_join_rows, jax.lax.map(jax.checkpoint(of_queries), parts))
    metrics["in_batch_accuracy"] = jnp.mean(beats)
    loss = jnp.mean(loss)
    if config.flops_query_weight or config.flops_document_weight:
        loss += config.flops_query_weight * flops(compared.query)
        loss += config.flops_document_weight * flops(compared.passages, real)
        metrics["query_terms"] = jnp.mean(jnp.sum(compared.query > 0, axis=1))
        metrics["document_terms"] = jnp.mean(jnp.sum(compared.positive > 0, axis=1))
    return loss, metrics


def _queries_at_once(micro_batch: int, queries: int, passages: int) -> int:
    """Queries whose scores are computed together: all where there are no micro-batches.

    Else as many micro-batches of them as the scores fit `SCORE_BYTES`, and one at least.
    """
    if not micro_batch:
        return queries
    size = micro_batch
    while queries % (2 * size) == 0 and 2 * size * passages * 4 <= SCORE_BYTES:
        size *= 2
    return size


def _embed_batch(
    model: Any,
    batch: Mapping[str, jax.Array],
    retriever: Retriever,
    config: ContrastiveConfig,
    key: jax.Array | None,
) -> dict[str, jax.Array]:
    """Vectors [rows, dim] of each kind of text in a batch, in the batch's order."""
    vectors, size = {}, config.micro_batch
    for towers in _by_length(batch):
        chunks = [_chunks(batch, tower, size, key) for tower in towers]
        if not size:
            own = (_embed_chunk(model, chunk, retriever) for chunk in chunks)
            vectors |= dict(zip(towers, own, strict=True))
            continue
        mapped = jax.lax.map(lambda chunk: _embed_chunk(model, chunk, retriever), _join(chunks))
        ends = np.cumsum([len(ids) for ids, _, _ in chunks])[:-1]
        for tower, part in zip(towers, jnp.split(mapped, ends), strict=True):
            vectors[tower] = _join_rows(part)
    return vectors


def _by_length(batch: Mapping[str, jax.Array]) -> list[list[str]]:
    """The kinds of text that a batch has, those of one length together."""
    groups: dict[int, list[str]] = {}
    for tower in (tower for tower in TOWERS if f"{tower}_ids" in batch):
        groups.setdefault(batch[f"{tower}_ids"].shape[1], []).append(tower)
    return list(groups.values())


def _split_rows(x: jax.Array, micro_batch: int) -> jax.Array:
    """[rows, ...] to [rows / micro_batch, micro_batch, ...]; `_join_rows` undoes it."""
    # Every so many rows, not side by side: on a mesh each micro-batch has rows of every device.
    return jnp.swapaxes(x.reshape(micro_batch, -1, *x.shape[1:]), 0, 1)


def _join_rows(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])


def _join(pieces: Iterable[Any]) -> Any:
    """Trees of split arrays one after another: one loop over them compiles once."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)


def _embed_chunk(model: Any, chunk: Any, retriever: Retriever) -> jax.Array:
    ids, mask, key = chunk
    return retriever.embed(model, ids, mask, dropout_key=key)


def _chunks(
    batch: Mapping[str, jax.Array], tower: str, micro_batch: int, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Ids, mask and dropout key of a kind of text; cut into micro-batches, if there are any."""
    key = None if key is None else jax.random.fold_in(key, TOWERS.index(tower))
    ids, mask = batch[f"{tower}_ids"], batch[f"{tower}_mask"]
    if not micro_batch:
        return ids, mask, key
    keys = None if key is None else jax.random.split(key, ids.shape[0] // micro_batch)
    return _split_rows(ids, micro_batch), _split_rows(mask, micro_batch), keys
