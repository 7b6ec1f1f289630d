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
    flops_query_weight: NotNegative = 0.0
    flops_document_weight: NotNegative = 0.0
    query_likelihood_weight: NotNegative = 0.0


@flax.struct.dataclass
class Vectors:
    """What the losses of a batch, or of some of its queries, compare.

    Attributes:
        query: [rows, dim], expanded or not.
        positive: [batch, dim] of each query's relevant document.
        negative: [batch * negatives, dim], a query's own side by side, or None.
        plain: [rows, dim] of expanded queries without their expansions, or None.
        everyone: [batch, dim] of all queries, where documents are compared with them; None where
            `query` has all.
    """

    query: jax.Array
    positive: jax.Array
    negative: jax.Array | None = None
    plain: jax.Array | None = None
    everyone: jax.Array | None = None

    @property
    def passages(self) -> jax.Array:
        """[batch * (1 + negatives), dim]."""
        both = (self.positive, self.negative)
        return self.positive if self.negative is None else jnp.concatenate(both)

    def own_scores(self, rows: jax.Array | None = None) -> jax.Array:
        """[rows, 1 + negatives] scores of each query's own passages, the positive's first.

        `rows` [rows]: which of the batch's queries these are; None: all of them.
        """
        negative = self.negative.reshape(len(self.positive), -1, self.positive.shape[1])
        positive, negative = _of(rows, self.positive), _of(rows, negative)
        own = jnp.concatenate([positive[:, None], negative], axis=1)
        return jnp.einsum("qd,qpd->qp", self.query, own, precision=jax.lax.Precision.HIGHEST)


def _of(rows: jax.Array | None, x: jax.Array) -> jax.Array:
    return x if rows is None else x[rows]


def same_text(texts: jax.Array, relevant: jax.Array) -> jax.Array:
    """Whether each text is one of those that are relevant to each query: [queries, texts] bool.

    Args:
        texts: [texts, 2] int32, a hash of each.
        relevant: [queries, count, 2] int32, hashes of what is relevant to each query.
    """

    def add(i: jax.Array, found: jax.Array) -> jax.Array:
        one = relevant[:, i, None]
        return found | ((one[..., 0] == texts[:, 0]) & (one[..., 1] == texts[:, 1]))

    texts, relevant = jnp.asarray(texts), jnp.asarray(relevant)
    # One after another: all at once they could become an array of their own.
    none, count = jnp.zeros((len(relevant), len(texts)), bool), relevant.shape[1]
    return jax.lax.fori_loop(0, count, add, none, unroll=max(1, min(count, 8)))


def info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    excluded: jax.Array | None = None,
    rows: jax.Array | None = None,
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
        rows: [rows] int32, where `queries` [rows, dim] and `excluded` [rows, batch + count] are of
            these queries of the batch; None: of all.

    Returns:
        [rows] losses.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        van den Oord et al., arXiv 1807.03748; ExpandR, arXiv 2502.17057, equation of the retriever.
    """
    if queries.shape != positives.shape and rows is None:
        raise ValueError(f"queries {queries.shape} and positives {positives.shape} differ in shape")
    queries, positives = queries.astype(jnp.float32), positives.astype(jnp.float32)
    passages = positives
    if negatives is not None:
        if negatives.shape[1:] != queries.shape[1:]:
            raise ValueError(f"negatives {negatives.shape} do not fit queries {queries.shape}")
        passages = jnp.concatenate([positives, negatives.astype(jnp.float32)])
    scores = jnp.matmul(queries, passages.T, precision=jax.lax.Precision.HIGHEST) / temperature
    # A row-wise product, not the diagonal of `scores`: on a mesh it needs no extra collective.
    positive = jnp.sum(queries * _of(rows, positives), axis=-1) / temperature
    if excluded is not None:
        scores = jnp.where(_others(excluded, rows), EXCLUDED, scores)
    return jax.nn.logsumexp(scores, axis=-1) - positive


def _others(excluded: jax.Array, rows: jax.Array | None) -> jax.Array:
    """`excluded` without each query's own positive, which always counts."""
    rows = jnp.arange(len(excluded)) if rows is None else rows
    return excluded & (jnp.arange(excluded.shape[1]) != rows[:, None])


def symmetric_info_nce(
    queries: jax.Array,
    positives: jax.Array,
    negatives: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
    excluded: jax.Array | None = None,
    rows: jax.Array | None = None,
    everyone: jax.Array | None = None,
    excluded_queries: jax.Array | None = None,
) -> jax.Array:
    """Mean of `info_nce` and of the same loss of each positive over all queries: [rows] losses.

    Arguments are as for `info_nce`. An excluded pair is left out both ways; only queries are
    compared with the negatives. With `rows` there are also `everyone` [batch, dim], all queries,
    and `excluded_queries` [rows, batch]: those that a positive must not count against.

    References:
        Radford et al., arXiv 2103.00020, figure 3.
    """
    options = {"temperature": temperature, "rows": rows}
    forward = info_nce(queries, positives, negatives, excluded=excluded, **options)
    if rows is None:
        everyone = queries
        excluded_queries = None if excluded is None else excluded[:, : queries.shape[0]].T
    own = _of(rows, positives)
    backward = info_nce(own, everyone, excluded=excluded_queries, **options)
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
    rows: jax.Array | None = None,
) -> jax.Array:
    """How far a query's ranking of the batch's passages changes by being expanded.

    KL(P || Q) in float32, where P = softmax(q_exp.p / tau) and Q = softmax(q.p / tau) over the
    passages. Both are variants of one query: gradients go through both.

    Args:
        expanded: [rows, dim].
        plain: [rows, dim] the same queries.
        passages: [count, dim], each query's positive at its own row.
        temperature: tau.
        excluded: [rows, count] bool as for `info_nce`: passages that a query is not compared with.
        rows: [rows] int32, which of the batch's queries these are; None: all.

    Returns:
        [rows] losses.

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
    given = jnp.ones(by_plain.shape, bool) if excluded is None else ~_others(excluded, rows)
    return distillation_kl(by_plain, by_expanded, given)


def flops(vectors: jax.Array, given: jax.Array | None = None) -> jax.Array:
    """The sum over components of their squared means, of vectors whose numbers are 0 or more.

    It is what an inverted index computes for a pair of such vectors, if components were drawn
    alike: it makes them rare, and above all the common ones.

    Args:
        vectors: [count, dim].
        given: [count] bool, which of them count; None: all.

    Returns:
        A number, float32.

    References:
        Paria et al., arXiv 2004.05665; for SPLADE Formal et al., arXiv 2107.05720, equation 4.
    """
    vectors = jnp.abs(vectors.astype(jnp.float32))
    if given is None:
        return jnp.sum(jnp.square(jnp.mean(vectors, axis=0)))
    total = jnp.sum(jnp.where(given[:, None], vectors, 0.0), axis=0)
    return jnp.sum(jnp.square(total / jnp.maximum(jnp.sum(given), 1)))


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
    given = {"temperature": tau, "excluded": batch["excluded"], "rows": batch.get("rows")}
    if not settings.symmetric:
        return info_nce(v.query, v.positive, v.negative, **given)
    back = {"everyone": v.everyone, "excluded_queries": batch.get("excluded_queries")}
    return symmetric_info_nce(v.query, v.positive, v.negative, **given, **back)


def _invariance(
    v: Vectors, batch: Mapping[str, jax.Array], tau: Any, settings: ContrastiveLossSettings
) -> jax.Array:
    if v.plain is None:  # No query is expanded: none changes.
        return jnp.zeros(len(v.query))
    given = {"temperature": tau, "excluded": batch["excluded"], "rows": batch.get("rows")}
    return invariance_kl(v.query, v.plain, v.passages, **given)


# (vectors, the batch's arrays, tau, settings) -> [rows] losses, summed by the weights that have
# their names. Of the arrays they need "excluded", a teacher's losses "given" and "teacher_scores";
# where the rows are some of the batch's queries, these are of them, and "rows" says which.
CONTRASTIVE_LOSSES: dict[str, Callable[..., jax.Array]] = {
    "info_nce": _info_nce,
    "margin_mse": lambda v, batch, tau, settings: margin_mse(
        v.own_scores(batch.get("rows")), batch["teacher_scores"], batch["given"]
    ),
    "kl": lambda v, batch, tau, settings: distillation_kl(
        v.own_scores(batch.get("rows")) / tau,
        batch["teacher_scores"] / settings.teacher_temperature,
        batch["given"],
    ),
    "invariance": _invariance,
}
LEARNED_FROM_A_TEACHER = ("margin_mse", "kl")


def loss_weights(settings: ContrastiveLossSettings) -> dict[str, float]:
    """The weights above 0, by their losses' names."""
    weights = {name: getattr(settings, f"{name}_weight") for name in CONTRASTIVE_LOSSES}
    return {name: weight for name, weight in weights.items() if weight}
