"""Losses of the retriever: pure functions of vectors or scores, one loss a query."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from expandr_jax.models.pooling import l2_normalize
from expandr_jax.settings import NotNegative, Positive

EXCLUDED = -1e30  # Score of a passage that is left out of a softmax; finite, so gradients stay so.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastiveLossSettings:
    """What the losses can be set to, a weight for each of `CONTRASTIVE_LOSSES` among it.

    configs/base.py says what each means.
    """

    temperature: Positive
    symmetric: bool = False
    info_nce_weight: NotNegative = 1.0
    margin_mse_weight: NotNegative = 0.0
    kl_weight: NotNegative = 0.0
    teacher_temperature: Positive = 1.0
    invariance_weight: NotNegative = 0.0


@flax.struct.dataclass
class Vectors:
    """What the losses of a batch compare.

    Attributes:
        query: [batch, dim], expanded or not.
        positive: [batch, dim] of each query's relevant document.
        negative: [batch * negatives, dim], a query's own side by side, or None.
        plain: [batch, dim] of expanded queries without their expansions, or None.
    """

    query: jax.Array
    positive: jax.Array
    negative: jax.Array | None = None
    plain: jax.Array | None = None

    @property
    def passages(self) -> jax.Array:
        """[batch * (1 + negatives), dim]."""
        both = (self.positive, self.negative)
        return self.positive if self.negative is None else jnp.concatenate(both)

    @property
    def own_scores(self) -> jax.Array:
        """[batch, 1 + negatives] scores of each query's own passages, the positive's first."""
        negative = self.negative.reshape(len(self.positive), -1, self.positive.shape[1])
        own = jnp.concatenate([self.positive[:, None], negative], axis=1)
        return jnp.einsum("qd,qpd->qp", self.query, own, precision=jax.lax.Precision.HIGHEST)


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
        scores = jnp.where(_others(excluded), EXCLUDED, scores)
    return jax.nn.logsumexp(scores, axis=-1) - positive


def _others(excluded: jax.Array) -> jax.Array:
    """`excluded` without each query's own positive, which always counts."""
    return excluded & ~jnp.eye(*excluded.shape, dtype=bool)


def symmetric_info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    excluded: jax.Array | None = None,
) -> jax.Array:
    """Mean of `info_nce` and of the same loss of each positive over all queries: [batch] losses.

    All arguments are as for `info_nce`. An excluded pair is left out both ways; only queries are
    compared with the negatives.

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
        student, teacher: [batch, 1 + count] scores, the positive's first.
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
        student, teacher: [batch, passages] scores, divided by their temperatures.
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
    given = jnp.ones(by_plain.shape, bool) if excluded is None else ~_others(excluded)
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


def _info_nce(
    v: Vectors, batch: Mapping[str, jax.Array], tau: Any, settings: ContrastiveLossSettings
) -> jax.Array:
    loss = symmetric_info_nce if settings.symmetric else info_nce
    return loss(v.query, v.positive, v.negative, temperature=tau, excluded=batch["excluded"])


def _invariance(
    v: Vectors, batch: Mapping[str, jax.Array], tau: Any, settings: ContrastiveLossSettings
) -> jax.Array:
    if v.plain is None:  # No query is expanded: none changes.
        return jnp.zeros(len(v.query))
    return invariance_kl(v.query, v.plain, v.passages, temperature=tau, excluded=batch["excluded"])


# (vectors, the batch's arrays, tau, settings) -> [batch] losses, summed by the weights that have
# their names. The teacher's losses need "given" and "teacher_scores" of the batch.
CONTRASTIVE_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "info_nce": _info_nce,
    "margin_mse": lambda v, batch, tau, settings: margin_mse(
        v.own_scores, batch["teacher_scores"], batch["given"]
    ),
    "kl": lambda v, batch, tau, settings: distillation_kl(
        v.own_scores / tau, batch["teacher_scores"] / settings.teacher_temperature, batch["given"]
    ),
    "invariance": _invariance,
}
LEARNED_FROM_A_TEACHER = ("margin_mse", "kl")


def loss_weights(settings: ContrastiveLossSettings) -> dict[str, float]:
    """The weights above 0, by their losses' names."""
    weights = {name: getattr(settings, f"{name}_weight") for name in CONTRASTIVE_LOSSES}
    return {name: weight for name, weight in weights.items() if weight}
