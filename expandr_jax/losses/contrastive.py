"""Training objectives: pure functions of vectors or log-probabilities, one value per example."""

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


def dpo(
    chosen: jax.Array,
    rejected: jax.Array,
    reference_chosen: jax.Array,
    reference_rejected: jax.Array,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Direct preference optimisation of each pair, and the usual figures.

    With h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)):
    sigmoid: -(1 - e) log s(beta h) - e log s(-beta h); hinge: max(0, 1 - beta h);
    ipo: (h - 1 / (2 beta))^2, where log-probabilities are means over tokens;
    robust: (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e). e is `label_smoothing`.

    Args:
        chosen: [batch] log-probabilities of the chosen responses under the policy.
        rejected: [batch], of the rejected ones.
        reference_chosen: [batch], under the reference.
        reference_rejected: [batch], under the reference.
        beta: Strength of the tie to the reference.
        kind: "sigmoid", "hinge", "ipo" or "robust".
        label_smoothing: Share of pairs taken to be the wrong way round; below one half.

    Returns:
        [batch] losses, and {"reward_chosen", "reward_rejected", "margin", "accuracy", "kl"},
        [batch] each. A reward is beta times a response's log-ratio to the reference; "kl" is the
        mean of both log-ratios, log pi - log ref, without beta. Over responses that the policy
        samples its mean is KL(pi || ref); over given ones, as here, it only estimates that, and
        may be below 0. Where log-probabilities are means over tokens, so is it.

    Raises:
        ValueError: If the kind is unknown.

    References:
        Rafailov et al., arXiv 2305.18290, equation 7; IPO: arXiv 2310.12036, equation 17;
        robust: arXiv 2403.00409; hinge: SLiC, arXiv 2305.10425.
    """
    ratio_chosen = (chosen - reference_chosen).astype(jnp.float32)
    ratio_rejected = (rejected - reference_rejected).astype(jnp.float32)
    h = ratio_chosen - ratio_rejected
    right, wrong = jax.nn.log_sigmoid(beta * h), jax.nn.log_sigmoid(-beta * h)
    e = label_smoothing
    if kind == "sigmoid":
        loss = -(1 - e) * right - e * wrong
    elif kind == "robust":
        loss = (-(1 - e) * right + e * wrong) / (1 - 2 * e)
    elif kind == "hinge":
        loss = jax.nn.relu(1 - beta * h)
    elif kind == "ipo":
        loss = jnp.square(h - 1 / (2 * beta))
    else:
        raise ValueError(f"unknown DPO loss {kind!r}: sigmoid, hinge, ipo or robust")
    metrics = {
        "reward_chosen": beta * ratio_chosen,
        "reward_rejected": beta * ratio_rejected,
        "margin": beta * h,
        "accuracy": (h > 0).astype(jnp.float32),
        "kl": (ratio_chosen + ratio_rejected) / 2,
    }
    return loss, metrics


def token_log_probs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """log softmax(logits)[target] in float32: logits [..., vocab], targets [...] -> [...]."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


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
    back = None if excluded is None else excluded[:, : queries.shape[0]].T
    return (forward + info_nce(positives, queries, temperature=temperature, excluded=back)) / 2


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
