"""Distilled expansion: the query tower learns to give, from the plain query, the expanded one's
vector.

The queries alone are encoded and learned from. What they are compared with, their teacher's vectors
and the documents', are constants, so that no document's vector changes and no index is built anew.
"""

import dataclasses
import functools
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from expandr_jax.data.batches import batch_indices, bucket_length, pad
from expandr_jax.losses.contrastive import info_nce
from expandr_jax.losses.distillation import cosine_distance, ranking_kl
from expandr_jax.models.pooling import l2_normalize
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.settings import DistillSettings
from expandr_jax.objectives.trained import Frozen, joined, shardings_of, with_frozen_base
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.training.setup import TrainingSetup, set_up
from expandr_jax.training.train_state import TrainState
from expandr_jax.vectors.encoder import TEXTS_AT_ONCE, TextEncoder

# Vectors of a batch's queries, its arrays and the settings -> losses [rows], metrics [rows].
DistillationLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
# Which queries a batch has, and which of these rows are made -> the arrays that they learn from.
Compared = Callable[[np.ndarray, Any], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Lesson:
    """What a query tower learns.

    Attributes:
        queries: Query id -> query, of those that it learns from.
        compared: What these are compared with.
        losses: What is learned of that.
        hashes: Those of all this.
    """

    queries: Mapping[str, str]
    compared: Compared
    losses: DistillationLoss
    hashes: Sequence[str]


def distilled_losses(
    query: jax.Array, batch: Mapping[str, jax.Array], settings: DistillSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What the student is from its teacher: "targets" [rows, dim] of a batch from `targets_of`.

    With `kl_weight` its "documents" [count, dim], those of all queries, are ranked, too.
    """
    distance = cosine_distance(query, batch["targets"])
    losses, metrics = settings.cosine_weight * distance, {"cosine": 1.0 - distance}
    if settings.kl_weight:
        kl = ranking_kl(
            query, batch["targets"], batch["documents"], temperature=settings.temperature
        )
        losses, metrics = losses + settings.kl_weight * kl, {**metrics, "kl": kl}
    return losses, metrics


def contrastive_losses(
    query: jax.Array, batch: Mapping[str, jax.Array], settings: DistillSettings
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The control's, which has no teacher: `info_nce` over the documents of a batch's queries.

    The batch is from `documents_of`.
    """
    own = info_nce(
        l2_normalize(query.astype(jnp.float32)),
        batch["documents"],
        temperature=settings.temperature,
        excluded=batch["excluded"],
    )
    # A loss below log 2 means that the document beats all others together.
    return own, {"in_batch_accuracy": (own < jnp.log(2.0)).astype(jnp.float32)}


def distillation_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    retriever: Retriever,
    losses: DistillationLoss,
    settings: DistillSettings,
    optimizer: optax.GradientTransformation,
    frozen: Frozen = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the query tower: (state, batch, key) -> (state, metrics).

    Nothing is dropped out, so that the key is not used.
    """

    def mean_loss(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        query = retriever.embed(joined(frozen, params), batch["query_ids"], batch["query_mask"])
        each, metrics = losses(query, batch, settings)
        return jnp.mean(each), {name: jnp.mean(value) for name, value in metrics.items()}

    (loss, metrics), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    return state.apply(grads, optimizer), metrics


def distillation_setup(
    mesh: Mesh,
    retriever: Retriever,
    params: Any,
    losses: DistillationLoss,
    settings: DistillSettings,
    optimizer: optax.GradientTransformation,
) -> TrainingSetup:
    """Sets the training of a query tower up; what is trained of it is as in step A.

    Args:
        mesh: The devices.
        retriever: As it is trained, from `training_retriever`.
        params: Its parameters, or their shapes.
        losses: `distilled_losses`, or the control's.
        settings: The config's section `distill`.
        optimizer: From `section_optimizer`.
    """
    held, trained, shardings = shardings_of(mesh, retriever, params)
    step = with_frozen_base(distillation_step) if held else distillation_step
    step = functools.partial(step, retriever=retriever, losses=losses, settings=settings)
    return set_up(mesh, step, trained, shardings, optimizer, *held)


def targets_of(targets: Any, documents: Any = None, found: Any = None) -> Compared:
    """What queries with a teacher are compared with.

    Args:
        targets: [queries, dim] the teacher's vectors.
        documents: [count, dim] vectors of the corpus, where rankings are learned, too.
        found: [queries, depth] rows of the documents that each teacher finds first.
    """

    def arrays(indices: np.ndarray, rows: Any) -> dict[str, np.ndarray]:
        own = indices[rows]
        made = {"targets": np.asarray(targets[own], np.float32)}
        if found is not None:
            made["documents"] = np.asarray(documents[found[own].reshape(-1)], np.float32)
        return made

    return arrays


def documents_of(positives: Sequence[Sequence[int]], documents: Any) -> Compared:
    """What queries of the control are compared with: the first relevant document of each.

    Another query's document that is relevant to a query, too, is not held against it.

    Args:
        positives: Rows of each query's relevant documents, the best first.
        documents: [count, dim] vectors of the corpus.
    """

    def arrays(indices: np.ndarray, rows: Any) -> dict[str, np.ndarray]:
        every = np.array([positives[i][0] for i in indices])
        known = [np.isin(every, positives[i]) for i in indices[rows]]
        return {
            "documents": np.asarray(documents[every[rows]], np.float32),
            "excluded": np.stack(known),
        }

    return arrays


def query_tokens(
    encoder: TextEncoder, queries: Sequence[str], cut: Callable[[Sequence[bool]], None]
) -> list["array[int]"]:
    """Token ids of queries, 4 bytes each: lists of them would be gigabytes for 700,000 queries.

    `cut` is called with whether each is longer than the retriever reads, some at a time.
    """
    made: list[array[int]] = []
    for first in range(0, len(queries), TEXTS_AT_ONCE):
        some = encoder.tokenize(queries[first : first + TEXTS_AT_ONCE], "query", cut)
        made += (array("i", ids) for ids in some)
    return made


@dataclasses.dataclass(frozen=True)
class DistillationBatches:
    """The batches of a query tower; each is a function of the seed and the step's number alone.

    Attributes:
        queries: Token ids of each.
        names: What messages call them.
        compared: What they learn from.
        batch_size: Queries a batch.
        seed: What the order depends on.
        pad_id: Fills up rows.
        longest: No query has more tokens.
    """

    queries: Sequence[Sequence[int]]
    names: Sequence[str]
    compared: Compared
    batch_size: int
    seed: int
    pad_id: int
    longest: int

    def batch(
        self, number: int, rows: Any, flops: Callable[[int], float]
    ) -> tuple[dict[str, np.ndarray], Contents]:
        """Some rows of a step's arrays, padded as all are, and what the whole step is made of.

        `flops` says how many operations training on a text of so many tokens takes.
        """
        indices = batch_indices(self.seed, number, len(self.queries), self.batch_size)
        texts = [self.queries[i] for i in indices]
        lengths = [*map(len, texts)]
        length = min(bucket_length(max(lengths)), self.longest)
        ids, mask = pad([texts[row] for row in np.arange(len(texts))[rows]], self.pad_id, length)
        arrays = {"query_ids": ids, "query_mask": mask, **self.compared(indices, rows)}
        named = [self.names[i] for i in indices]
        return arrays, Contents(named, sum(lengths), sum(map(flops, lengths)))
