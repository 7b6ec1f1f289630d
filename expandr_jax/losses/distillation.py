"""Losses of the query tower: pure functions of vectors, one loss a query.

A query's vector counts by its direction alone: its length changes no ranking.
"""

import dataclasses

import jax
import jax.numpy as jnp

from expandr_jax.losses.contrastive import distillation_kl
from expandr_jax.models.pooling import l2_normalize
from expandr_jax.settings import NotNegative, Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationLossSettings:
    """What the losses can be set to; configs/base.py says what each means."""

    cosine_weight: NotNegative
    kl_weight: NotNegative
    temperature: Positive


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cosine of each row, in float32: [rows, dim] twice to [rows]."""
    student, teacher = (l2_normalize(x.astype(jnp.float32)) for x in (student, teacher))
    return 1.0 - jnp.sum(student * teacher, axis=-1)


def ranking_kl(
    student: jax.Array, teacher: jax.Array, documents: jax.Array, *, temperature: float
) -> jax.Array:
    """How far a student's ranking of documents is from its teacher's.

    KL(P || Q) in float32, where P = softmax(t.d / tau) and Q = softmax(s.d / tau)
    over the documents, the queries' vectors t and s being brought to unit length. A document that
    stands there twice counts twice in both.

    Args:
        student, teacher: [rows, dim].
        documents: [count, dim], as they are searched.
        temperature: tau.

    Returns:
        [rows] losses.

    References:
        Hinton et al., arXiv 1503.02531; for rankings Lin et al., arXiv 2010.11386.
    """
    documents = documents.astype(jnp.float32)
    by_student, by_teacher = (
        jnp.matmul(l2_normalize(x.astype(jnp.float32)), documents.T,
                   precision=jax.lax.Precision.HIGHEST) / temperature
        for x in (student, teacher)
    )  # fmt: skip
    return distillation_kl(by_student, by_teacher, jnp.ones(by_student.shape, bool))
