"""Vectors of queries, and how they are fused with the vectors of their expansions."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.models.pooling import l2_normalize

Normalize = Literal["none", "before", "after", "both"]
NORMALIZE: Normalize = "both"  # Where there is no config: the default of `contrastive.normalize`.


@dataclasses.dataclass(frozen=True)
class EncodedQueries:
    """Vectors of the queries of one split, under one retriever.

    Attributes:
        ids: Query ids.
        queries: [queries, dim].
        expansions: [queries, samples, dim], or None.
        present: [queries, samples] bool, False for an empty generation, or None.
    """

    ids: Sequence[str]
    queries: np.ndarray
    expansions: np.ndarray | None = None
    present: np.ndarray | None = None


def expanded_query(
    query: jax.Array,
    expansions: jax.Array,
    present: jax.Array,
    *,
    query_weight: float,
    normalize: Normalize,
) -> jax.Array:
    """w E(q) + (1 - w) mean_i E(d_i), with every choice explicit; ExpandR's equation has w = 1/2.

    Args:
        query: [batch, dim] vectors of the queries.
        expansions: [batch, samples, dim] vectors of their generated passages.
        present: [batch, samples] bool, False for an empty generation, which counts for nothing;
            a query without any passage keeps its own vector.
        query_weight: w, between 0 and 1.
        normalize: Where vectors are brought to unit length: "before" the mean, "after" it, "both"
            or "none".

    Returns:
        [batch, dim] float32.
    """
    query, expansions = query.astype(jnp.float32), expansions.astype(jnp.float32)
    if normalize in ("before", "both"):
        query, expansions = l2_normalize(query), l2_normalize(expansions)
    count = jnp.sum(present, axis=1, keepdims=True)
    total = jnp.sum(jnp.where(present[..., None], expansions, 0.0), axis=1)
    mixed = query_weight * query + (1 - query_weight) * total / jnp.maximum(count, 1)
    mixed = jnp.where(count > 0, mixed, query)
    return l2_normalize(mixed) if normalize in ("after", "both") else mixed


# One program for each shape: uncompiled, each of its dozen operations would be a program.
fuse = jax.jit(expanded_query, static_argnames="normalize")


def fuse_each(
    query: np.ndarray, expansions: np.ndarray, present: np.ndarray, **options: Any
) -> np.ndarray:
    """`expanded_query` of each query with each of its passages alone: [batch, samples, dim]."""
    batch, samples, width = expansions.shape
    vectors = fuse(
        np.repeat(query, samples, axis=0),
        expansions.reshape(-1, 1, width),
        present.reshape(-1, 1),
        **options,
    )
    return np.asarray(vectors).reshape(batch, samples, width)


def separate(query: np.ndarray, expansions: np.ndarray, normalize: Normalize) -> np.ndarray:
    """A query's vector [dim] and those of its passages [samples, dim], each to be searched for.

    They are of unit length, [1 + samples, dim], unless `normalize` is "none".
    """
    vectors = np.concatenate([query[None], expansions]).astype(np.float32)
    if normalize == "none":
        return vectors
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
