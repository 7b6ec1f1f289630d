"""Step A: the retriever learns from expanded queries, contrastively (ExpandR, arXiv 2502.17057)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from expandr_jax.data.batches import pad
from expandr_jax.fusion import Normalize, expanded_query
from expandr_jax.losses import info_nce
from expandr_jax.models.retriever import Retriever
from expandr_jax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """What the contrastive loss compares.

    Attributes:
        temperature: tau.
        query_weight: Weight of the query's own vector; 1 trains on plain queries.
        normalize: Where expanded query vectors are brought to unit length.
    """

    temperature: float
    query_weight: float
    normalize: Normalize


@dataclasses.dataclass(frozen=True)
class ContrastiveExample:
    """Token ids of one training query, its expansions (may be none) and its right document.

    Attributes:
        query: Ids of the query.
        expansions: Ids of each sampled passage; an empty generation is left out.
        positive: Ids of the right document.
        positive_text: Hash or id of the right document's text, to find equal ones in a batch.
    """

    query: Sequence[int]
    expansions: Sequence[Sequence[int]]
    positive: Sequence[int]
    positive_text: str


def make_batch(
    examples: Sequence[ContrastiveExample], pad_id: int, samples: int
) -> dict[str, np.ndarray]:
    """Arrays of one batch; `samples` expansions a query (0 for plain queries).

    Returns:
        "query_ids", "query_mask" [batch, length]; "positive_ids", "positive_mask"; "excluded"
        [batch, batch]; with samples also "expansion_ids", "expansion_mask" [batch * samples,
        length] and "present" [batch, samples].
    """
    batch: dict[str, np.ndarray] = {}
    batch["query_ids"], batch["query_mask"] = pad([e.query for e in examples], pad_id)
    batch["positive_ids"], batch["positive_mask"] = pad([e.positive for e in examples], pad_id)
    texts = np.array([e.positive_text for e in examples])
    batch["excluded"] = texts[:, None] == texts[None, :]
    if samples:
        present = [[i < len(e.expansions) for i in range(samples)] for e in examples]
        rows = [
            e.expansions[i] if i < len(e.expansions) else e.query
            for e in examples
            for i in range(samples)
        ]
        batch["expansion_ids"], batch["expansion_mask"] = pad(rows, pad_id)
        batch["present"] = np.array(present)
    return batch


def contrastive_loss(
    params: Any, batch: dict[str, jax.Array], *, retriever: Retriever, config: ContrastiveConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean InfoNCE of a batch and its figures: the share of queries whose own document wins."""
    query = retriever.embed(params, batch["query_ids"], batch["query_mask"])
    positive = retriever.embed(params, batch["positive_ids"], batch["positive_mask"])
    if "present" in batch:
        rows, samples = batch["present"].shape
        expansions = retriever.embed(params, batch["expansion_ids"], batch["expansion_mask"])
        query = expanded_query(
            query,
            expansions.reshape(rows, samples, -1),
            batch["present"],
            query_weight=config.query_weight,
            normalize=config.normalize,
        )
    loss = info_nce(query, positive, temperature=config.temperature, excluded=batch["excluded"])
    # A loss below log 2 means that the document beats all others together.
    return jnp.mean(loss), {"in_batch_accuracy": jnp.mean(loss < jnp.log(2.0))}


def contrastive_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    retriever: Retriever,
    config: ContrastiveConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update of the retriever: (state, batch) -> (state, metrics)."""
    (loss, metrics), grads = jax.value_and_grad(contrastive_loss, has_aux=True)(
        state.params, batch, retriever=retriever, config=config
    )
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), **metrics}
    return state.apply(grads, optimizer), metrics
