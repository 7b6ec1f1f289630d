"""Losses of a re-ranker: pure functions of the scores of each query's documents, one a query."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from expandr_jax.losses.contrastive import EXCLUDED


def binary(scores: jax.Array, given: jax.Array) -> jax.Array:
    """Mean cross-entropy of each pair's own judgement, relevant or not, in float32.

    Args:
        scores: [queries, documents], the relevant document's first.
        given: [queries, documents] bool, False where a query has no such document.

    Returns:
        [queries] losses.

    References:
        Nogueira and Cho, arXiv 1901.04085, section 3.
    """
    scores = scores.astype(jnp.float32)
    relevant = jnp.arange(scores.shape[1]) == 0
    # -log sigmoid of the score, or of its negative.
    losses = jax.nn.softplus(jnp.where(relevant, -scores, scores))
    return jnp.sum(jnp.where(given, losses, 0.0), axis=1) / jnp.sum(given, axis=1)


def listwise(scores: jax.Array, given: jax.Array) -> jax.Array:
    """-log softmax of the relevant document's score among its query's; arguments as of `binary`.

    References:
        Gao et al., arXiv 2101.08751, equation 3; ListNet's, Cao et al., ICML 2007, with one
        relevant document.
    """
    scores = jnp.where(given, scores.astype(jnp.float32), EXCLUDED)
    return jax.nn.logsumexp(scores, axis=1) - scores[:, 0]


RERANKING_LOSSES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "binary": binary,
    "listwise": listwise,
}
