"""The losses against literal constants, numpy twins, and themselves on meshes of 8 devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec
from sentence_transformers.sentence_transformer.losses import (
    DistillKLDivLoss,
    MarginMSELoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.util import dot_score

from expandr_jax.losses.contrastive import (
    distillation_kl,
    info_nce,
    invariance_kl,
    margin_mse,
    matryoshka,
    symmetric_info_nce,
)
from expandr_jax.losses.language import token_log_probs
from expandr_jax.losses.preference import (
    PREFERENCE_LOSSES,
    PreferenceSettings,
    preference_metrics,
)
from expandr_jax.sharding import make_mesh


def numpy_info_nce(queries, positives, negatives, temperature, excluded=None):
    """The definition, in float64, one query at a time."""
    passages = np.concatenate([positives, negatives]).astype(np.float64)
    losses = []
    for i, query in enumerate(queries.astype(np.float64)):
        kept = [j for j in range(len(passages)) if j == i or excluded is None or not excluded[i, j]]
        scores = passages[kept] @ query / temperature
        losses.append(-math.log(np.exp(scores[kept.index(i)] - scores.max())
                                / np.exp(scores - scores.max()).sum()))  # fmt: skip
    return np.array(losses)


def vectors(seed, *shape):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_info_nce_of_a_worked_example():
    # Two orthogonal pairs at tau 1: each query scores 1 for its own document and 0 for the other.
    loss = info_nce(jnp.eye(2), jnp.eye(2))
    np.testing.assert_allclose(loss, [math.log(1 + math.exp(-1))] * 2, rtol=1e-6)
    # One explicit negative that equals the query doubles the weight of the numerator's term.
    loss = info_nce(jnp.eye(2)[:1], jnp.eye(2)[:1], jnp.eye(2)[:1])
    np.testing.assert_allclose(loss, [math.log(2)], rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_info_nce_equals_its_numpy_twin(temperature):
    queries, positives, negatives = vectors(0, 6, 16), vectors(1, 6, 16), vectors(2, 9, 16)
    excluded = np.random.default_rng(3).random((6, 15)) < 0.3
    ours = info_nce(queries, positives, negatives, temperature=temperature, excluded=excluded)
    twin = numpy_info_nce(queries, positives, negatives, temperature, excluded)
    np.testing.assert_allclose(ours, twin, atol=2e-5)


def test_same_text_in_the_batch_is_not_a_negative():
    queries, positives = vectors(0, 3, 8), vectors(1, 3, 8)
    positives[2] = positives[0]
    excluded = np.array([[True, False, True], [False, True, False], [True, False, True]])
    masked = info_nce(queries, positives, temperature=0.1, excluded=excluded)
    alone = info_nce(queries[:1], positives[:1], positives[1:2], temperature=0.1)
    np.testing.assert_allclose(masked[0], alone[0], rtol=1e-5)


def test_info_nce_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="differ in shape"):
        info_nce(jnp.ones((2, 3)), jnp.ones((3, 3)))
    with pytest.raises(ValueError, match="do not fit"):
        info_nce(jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.ones((2, 4)))


def test_symmetric_info_nce_equals_sentence_transformers():
    queries, positives, negatives = vectors(0, 6, 16), vectors(1, 6, 16), vectors(2, 6, 16)
    peer = MultipleNegativesRankingLoss(
        None,
        scale=10.0,
        similarity_fct=dot_score,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    columns = [torch.tensor(x) for x in (queries, positives, negatives)]
    expected = peer.compute_loss_from_embeddings(columns, None)
    ours = symmetric_info_nce(queries, positives, negatives, temperature=0.1)
    np.testing.assert_allclose(ours.mean(), expected, atol=1e-5)


def test_symmetric_info_nce_leaves_out_a_pair_both_ways():
    queries, positives = vectors(0, 3, 8), vectors(1, 3, 8)
    excluded = np.zeros((3, 3), bool)
    excluded[0, 2] = True  # Document 2 is right for query 0 as well.
    ours = symmetric_info_nce(queries, positives, temperature=0.1, excluded=excluded)
    back = numpy_info_nce(positives, queries, queries[:0], 0.1, excluded.T)
    forward = numpy_info_nce(queries, positives, positives[:0], 0.1, excluded)
    np.testing.assert_allclose(ours, (forward + back) / 2, atol=1e-5)


def test_invariance_of_a_worked_example():
    # The expanded query ranks the two passages 3 to 1, the plain one evenly.
    passages = jnp.eye(2)
    expanded, plain = jnp.array([[math.log(3), 0.0]]), jnp.zeros((1, 2))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    np.testing.assert_allclose(invariance_kl(expanded, plain, passages), [expected], rtol=1e-6)
    np.testing.assert_allclose(invariance_kl(plain, plain, passages), [0], atol=1e-7)
    only_own = invariance_kl(expanded, plain, passages, excluded=jnp.array([[True, True]]))
    np.testing.assert_allclose(only_own, [0], atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_invariance_equals_its_numpy_twin(temperature):
    expanded, plain, passages = vectors(0, 6, 16), vectors(1, 6, 16), vectors(2, 15, 16)
    excluded = np.random.default_rng(3).random((6, 15)) < 0.3
    twin = []
    for i in range(6):
        kept = [j for j in range(15) if j == i or not excluded[i, j]]
        logs = []
        for query in (expanded[i], plain[i]):
            scores = passages[kept].astype(np.float64) @ query.astype(np.float64) / temperature
            logs.append(scores - scores.max() - np.log(np.exp(scores - scores.max()).sum()))
        twin.append(np.sum(np.exp(logs[0]) * (logs[0] - logs[1])))
    ours = invariance_kl(expanded, plain, passages, temperature=temperature, excluded=excluded)
    np.testing.assert_allclose(ours, twin, rtol=1e-4, atol=1e-5)
    assert min(twin) > 0


def scores_and_teacher():
    queries, passages = vectors(0, 5, 16), vectors(1, 5, 3, 16)
    teacher = 3 * np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    columns = [torch.tensor(x) for x in (queries, *np.moveaxis(passages, 1, 0))]
    return np.einsum("qd,qpd->qp", queries, passages), teacher, columns


def test_margin_mse_equals_sentence_transformers():
    scores, teacher, columns = scores_and_teacher()
    expected = MarginMSELoss(None).compute_loss_from_embeddings(columns, torch.tensor(teacher))
    ours = margin_mse(scores, teacher, np.ones((5, 3), bool))
    np.testing.assert_allclose(ours.mean(), expected, rtol=1e-5)
    given = np.array([[True, True, False], [True, False, False]])
    ours = margin_mse(np.array([[3.0, 1, 9]] * 2), np.array([[5.0, 4, 0]] * 2), given)
    np.testing.assert_allclose(ours, [1.0, 0.0])  # ((3 - 1) - (5 - 4))^2, and nothing to compare


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_kl_equals_sentence_transformers(temperature):
    scores, teacher, columns = scores_and_teacher()
    peer = DistillKLDivLoss(None, temperature=temperature)
    expected = peer.compute_loss_from_embeddings(columns, torch.tensor(teacher))
    given = np.ones((5, 3), bool)
    ours = distillation_kl(scores / temperature, teacher / temperature, given)
    np.testing.assert_allclose(ours.mean() * temperature**2, expected, rtol=1e-5)
    given[:, 2] = False
    fewer = distillation_kl(scores, teacher, given)
    alone = distillation_kl(scores[:, :2], teacher[:, :2], given[:, :2])
    np.testing.assert_allclose(fewer, alone, rtol=1e-5)


def test_matryoshka_equals_pytorch():
    queries, positives = vectors(0, 6, 16), vectors(1, 6, 16)
    expected = 0.0
    for dimension in (4, 16):
        q, p = (
            torch.nn.functional.normalize(torch.tensor(x)[:, :dimension], dim=-1)
            for x in (queries, positives)
        )
        expected += torch.nn.functional.cross_entropy(q @ p.T / 0.1, torch.arange(6)) / 2

    def loss(q, p, n):
        return info_nce(q, p, n, temperature=0.1)

    ours = matryoshka(loss, (4, 16), queries, positives, None)
    np.testing.assert_allclose(ours.mean(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="between 1 and 16"):
        matryoshka(loss, (4, 17), queries, positives, None)


def dpo(chosen, rejected, reference_chosen, reference_rejected, kind="sigmoid", **settings):
    """A preference loss and its metrics, from a column for each side of each model."""
    policy = jnp.stack([chosen, rejected], axis=1)
    reference = jnp.stack([reference_chosen, reference_rejected], axis=1)
    settings = PreferenceSettings(**settings)
    losses = PREFERENCE_LOSSES[kind].losses(policy, reference, settings)
    return losses, preference_metrics(policy, reference, settings.beta)


def test_dpo_literal_constants():
    # h = (-10 + 12) - (-9 + 8) = 3; beta h = 0.3.
    arguments = [jnp.array([x]) for x in (-10.0, -9.0, -12.0, -8.0)]
    expected = {
        "sigmoid": 0.5543552444685272,  # log(1 + exp(-0.3))
        "hinge": 0.7,
        "ipo": 4.0,  # (3 - 5)^2
    }
    for kind, value in expected.items():
        loss, metrics = dpo(*arguments, beta=0.1, kind=kind)
        np.testing.assert_allclose(loss, [value], rtol=1e-5)
        np.testing.assert_allclose(metrics["margin"], [0.3], rtol=1e-5)
        np.testing.assert_allclose(metrics["reward_chosen"], [0.2], rtol=1e-5)
        np.testing.assert_allclose(metrics["reward_rejected"], [-0.1], rtol=1e-5)
        np.testing.assert_allclose(metrics["accuracy"], [1.0])
        np.testing.assert_allclose(metrics["kl"], [0.5])  # (2 - 1) / 2
    # log(1 + exp(0.3)) = 0.8543552444685272 is the loss of the pair the other way round.
    loss, _ = dpo(*arguments, beta=0.1, label_smoothing=0.1)
    np.testing.assert_allclose(
        loss, [0.9 * 0.5543552444685272 + 0.1 * 0.8543552444685272], rtol=1e-5
    )
    loss, _ = dpo(*arguments, beta=0.1, kind="robust", label_smoothing=0.1)
    expected = (0.9 * 0.5543552444685272 - 0.1 * 0.8543552444685272) / 0.8
    np.testing.assert_allclose(loss, [expected], rtol=1e-5)


def test_simpo_literal_constants():
    """Mean log-probabilities -1 and -1.4, beta 2, gamma 0.5: a margin of 0.8 - 0.5."""
    loss, simpo = PREFERENCE_LOSSES["simpo"].losses, PREFERENCE_LOSSES["simpo"]
    policy = jnp.array([[-1.0, -1.4], [-1.4, -1.0]])
    found = loss(policy, None, PreferenceSettings(beta=2.0, gamma=0.5))
    expected = [math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(1.3))]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    smoothed = loss(policy, None, PreferenceSettings(beta=2.0, gamma=0.5, label_smoothing=0.1))
    np.testing.assert_allclose(
        smoothed[0], 0.9 * expected[0] + 0.1 * (expected[0] + 0.3), rtol=1e-6
    )
    assert not simpo.reference
    assert simpo.per_token
    metrics = preference_metrics(policy, None, 2.0)
    np.testing.assert_allclose(metrics["reward_chosen"], [-2.0, -2.8])
    assert "kl" not in metrics


def test_token_log_probs_equal_numpy():
    logits = np.random.default_rng(0).normal(size=(2, 3, 11)).astype(np.float32) * 5
    targets = np.array([[1, 2, 3], [10, 0, 5]])
    wide = logits.astype(np.float64)
    twin = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    twin = np.take_along_axis(twin, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_log_probs(logits, targets), twin, atol=1e-5)


class TestOnEightDevices:
    """Plain jit over a mesh, shard_map and pmap give one device's losses and gradients."""

    BATCH, NEGATIVES, DIM = 16, 24, 12

    @pytest.fixture
    def arrays(self):
        return (
            vectors(0, self.BATCH, self.DIM),
            vectors(1, self.BATCH, self.DIM),
            vectors(2, self.NEGATIVES, self.DIM),
        )

    @staticmethod
    def mean_loss(queries, positives, negatives):
        return jnp.mean(info_nce(queries, positives, negatives, temperature=0.05))

    @staticmethod
    def gathered_loss(queries, positives, negatives, axis):
        """This device's share of the loss: its queries against everybody's passages."""
        mine = jax.lax.axis_index(axis)
        rows = queries.shape[0]
        everyone = jax.lax.all_gather(positives, axis, tiled=True)
        given = jax.lax.all_gather(negatives, axis, tiled=True)
        first = mine * rows
        # A query's own document comes first in info_nce: the others follow as given negatives.
        order = (jnp.arange(everyone.shape[0]) + first) % everyone.shape[0]
        others = everyone[order][rows:]
        loss = info_nce(
            queries, everyone[order][:rows], jnp.concatenate([others, given]), temperature=0.05
        )
        return jnp.mean(loss)

    def test_contrastive(self, arrays):
        expected, grads = jax.value_and_grad(self.mean_loss, argnums=(0, 1, 2))(*arrays)
        twin = numpy_info_nce(*arrays, 0.05).mean()
        np.testing.assert_allclose(expected, twin, rtol=1e-5)
        mesh = make_mesh(data=8)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        sharded = [jax.device_put(a, rows) for a in arrays]
        loss, on_mesh = jax.jit(jax.value_and_grad(self.mean_loss, argnums=(0, 1, 2)))(*sharded)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for ours, theirs in zip(on_mesh, grads, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)

        spec = PartitionSpec("data")
        mapped = jax.shard_map(
            lambda *a: jax.lax.pmean(self.gathered_loss(*a, "data"), "data"),
            mesh=mesh, in_specs=(spec, spec, spec), out_specs=PartitionSpec(),
        )  # fmt: skip
        # The gradient is taken outside of shard_map, where it counts each device once.
        loss, on_shards = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1, 2)))(*sharded)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
        for ours, theirs in zip(on_shards, grads, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)

        split = [a.reshape(8, -1, self.DIM) for a in arrays]
        loss = jax.pmap(lambda *a: jax.lax.pmean(self.gathered_loss(*a, "i"), "i"), axis_name="i")(
            *split
        )
        np.testing.assert_allclose(loss, np.full(8, expected), rtol=1e-5)

    def test_dpo(self):
        arrays = [np.random.default_rng(s).normal(size=16).astype(np.float32) for s in range(4)]

        def mean_loss(*a):
            return jnp.mean(dpo(*a, beta=0.1)[0])

        expected, grad = jax.value_and_grad(mean_loss)(*arrays)
        mesh = make_mesh(data=8)
        rows = NamedSharding(mesh, PartitionSpec("data"))
        sharded = [jax.device_put(a, rows) for a in arrays]
        loss, on_mesh = jax.jit(jax.value_and_grad(mean_loss))(*sharded)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(on_mesh, grad, rtol=1e-5)
        spec = PartitionSpec("data")
        mapped = jax.shard_map(
            lambda *a: jax.lax.pmean(mean_loss(*a), "data"),
            mesh=mesh, in_specs=(spec,) * 4, out_specs=PartitionSpec(),
        )  # fmt: skip
        loss, on_shards = jax.jit(jax.value_and_grad(mapped))(*sharded)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(on_shards, grad, rtol=1e-5)
        parallel = functools.partial(jax.lax.pmean, axis_name="i")
        loss = jax.pmap(lambda *a: parallel(mean_loss(*a)), axis_name="i")(
            *[a.reshape(8, 2) for a in arrays]
        )
        np.testing.assert_allclose(loss, np.full(8, expected), rtol=1e-6)
