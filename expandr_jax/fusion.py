"""How a query's vector and its expansions' vectors become one."""

from typing import Literal

import jax
import jax.numpy as jnp

from expandr_jax.models.pooling import l2_normalize

Normalize = Literal["none", "before", "after", "both"]


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
