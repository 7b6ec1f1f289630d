"""Losses of the retriever: pure functions of vectors or scores, one loss a query."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from expandr_jax.models.pooling import l2_normalize

EXCLUDED = -1e30  # Score of a passage that is left out of a softmax; finite, so gradients stay so.


def info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    excluded: jax.Array | None = None,
) -> jax.Array:
    """Contrastive loss of each query over all passages of the global batch.

    -log exp(q.p+ / tau) / sum_p exp(q.p / tau), in float32. Query i's positive is row i of
    `positives`; every other query's positive and all `negatives` are its negatives. Under `jit`
    on a mesh, with rows sharded, this is the loss over the global batch.

    Args:
        queries: [batch, dim], expanded or not.
        positives: [batch, dim].
        negatives: [count, dim] given negatives of all queries, or None.
        temperature: tau.
        excluded: [batch, batch + count] bool, True where a passage must not count against a query
            (the same text as its positive, another known positive). A query's own positive counts
            whatever this says.

    Returns:
        [batch] losses.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        van den Oord et al., arXiv 1807.03748; ExpandR, arXiv 2502.17057, equation of the retriever.
    """
    if queries.shape != positives.shape:
        raise ValueError(f"queries {queries.shape} and positives {positives.shape} differ in shape")
    queries, positives = queries.astype(jnp.float32), positives.astype(jnp.float32)
    passages = positives
    if negatives is not None:
        if negatives.shape[1:] != queries.shape[1:]:
            raise ValueError(f"negatives {negatives.shape} do not fit queries {queries.shape}")
        passages = jnp.concatenate([positives, negatives.astype(jnp.float32)])
    scores = jnp.matmul(queries, passages.T, precision=jax.lax.Precision.HIGHEST) / temperature
    # A row-wise product, not the diagonal of `scores`: on a mesh it needs no extra collective.
    positive = jnp.sum(queries * positives, axis=-1) / temperature
    if excluded is not None:
        own = jnp.arange(scores.shape[1])[None, :] == jnp.arange(scores.shape[0])[:, None]
        scores = jnp.where(excluded & ~own, EXCLUDED, scores)
    return jax.nn.logsumexp(scores, axis=-1) - positive


def symmetric_info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    excluded: jax.Array | None = None,
) -> jax.Array:
    """Mean of `info_nce` and of the same loss of each positive over all queries.

    Args:
        queries: As for `info_nce`, as are all arguments; an excluded pair is left out both ways.
        positives: [batch, dim].
        negatives: [count, dim] or None; only queries are compared with them.
        temperature: tau.
        excluded: [batch, batch + count] bool or None.

    Returns:
        [batch] losses.

    References:
        Radford et al., arXiv 2103.00020, figure 3.
    """
    forward = info_nce(queries, positives, negatives, temperature=temperature, excluded=excluded)
    transposed = None if excluded is None else excluded[:, : queries.shape[0]].T
    backward = info_nce(positives, queries, temperature=temperature, excluded=transposed)
    return (forward + backward) / 2


def margin_mse(student: jax.Array, teacher: jax.Array, given: jax.Array) -> jax.Array:
    """Squared error of each query's score margins against a teacher's, mean over its negatives.

    Args:
        student: [batch, 1 + count] scores, the positive's first.
        teacher: [batch, 1 + count], likewise.
        given: [batch, 1 + count] bool, False where a query has no such negative.

    Returns:
        [batch] losses, 0 for a query without negatives.

    References:
        Hofstaetter et al., arXiv 2010.02666, equation 3.
    """
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    error = (student[:, :1] - student[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
    error = jnp.where(given[:, 1:], jnp.square(error), 0.0)
    return jnp.sum(error, axis=1) / jnp.maximum(jnp.sum(given[:, 1:], axis=1), 1)


def distillation_kl(student: jax.Array, teacher: jax.Array, given: jax.Array) -> jax.Array:
    """KL(softmax(teacher) || softmax(student)) over each query's passages, in float32.

    Args:
        student: [batch, passages] scores, divided by their temperature.
        teacher: [batch, passages], likewise.
        given: [batch, passages] bool, False where a query has no such passage.

    Returns:
        [batch] losses.

    References:
        Hinton et al., arXiv 1503.02531; for rankings Lin et al., arXiv 2010.11386.
    """
    student, teacher = (
        jax.nn.log_softmax(jnp.where(given, scores.astype(jnp.float32), EXCLUDED), axis=-1)
        for scores in (student, teacher)
    )
    return jnp.sum(jnp.where(given, jnp.exp(teacher) * (teacher - student), 0.0), axis=-1)


def invariance_kl(
    expanded: jax.Array,
    plain: jax.Array,
    passages: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    excluded: jax.Array | None = None,
) -> jax.Array:
    """How far a query's ranking of the batch's passages changes by being expanded.

    KL(P || Q) in float32, where P = softmax(q_exp.p / tau) and Q = softmax(q.p / tau) over the
    passages. Both are variants of one query: gradients go through both.

    Args:
        expanded: [batch, dim].
        plain: [batch, dim] the same queries.
        passages: [count, dim], each query's positive at its own row.
        temperature: tau.
        excluded: [batch, count] bool as for `info_nce`: passages that a query is not compared with.

    Returns:
        [batch] losses.

    References:
        The invariance term of Invar-RAG, arXiv 2411.07021, between the rankings of a query's
        variants.
    """
    passages = passages.astype(jnp.float32)
    by_plain, by_expanded = (
        jnp.matmul(q.astype(jnp.float32), passages.T, precision=jax.lax.Precision.HIGHEST)
        / temperature
        for q in (plain, expanded)
    )
    given = jnp.ones(by_plain.shape, bool)
    if excluded is not None:
        own = jnp.arange(given.shape[1])[None, :] == jnp.arange(given.shape[0])[:, None]
        given = ~excluded | own
    return distillation_kl(by_plain, by_expanded, given)


def matryoshka(
    loss: Callable[..., jax.Array], dimensions: Sequence[int], *vectors: jax.Array | None
) -> jax.Array:
    """Mean over dimensions of a loss of truncated vectors, brought to unit length again.

    Args:
        loss: Called with the vectors of each dimension.
        dimensions: How many leading components are kept; the whole width is one of them only if
            it is listed.
        *vectors: [..., dim] each; None is passed on.

    Returns:
        What `loss` returns, averaged.

    Raises:
        ValueError: If a dimension is not between 1 and the vectors' width.

    References:
        Kusupati et al., arXiv 2205.13147, equation 1.
    """
    width = jax.tree.leaves(vectors)[0].shape[-1]
    if not dimensions or not all(1 <= d <= width for d in dimensions):
        raise ValueError(f"dimensions {tuple(dimensions)} must lie between 1 and {width}")
    losses = [
        loss(*jax.tree.map(lambda v, d=d: l2_normalize(v[..., :d]), vectors)) for d in dimensions
    ]
    return sum(losses) / len(losses)
