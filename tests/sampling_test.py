"""The sampler against exact probabilities, a sorting twin in numpy, and transformers' filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers.generation import logits_process

from expandr_jax.generation.sampling import (
    BROKEN,
    RowSampling,
    penalize_repetition,
    sample,
)

DRAWS = 20_000
jitted = jax.jit(sample)


def settings(rows, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Settings of each row from numbers or sequences of them."""
    values = (temperature, np.float32), (top_p, np.float32), (top_k, np.int32), (min_p, np.float32)
    return RowSampling(*(jnp.asarray(np.broadcast_to(v, rows), t) for v, t in values))


def probabilities(logits, temperature, top_p, top_k, min_p):
    """The filtered distribution, by sorting, in float64; equals at a boundary are all kept."""
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    if top_k:
        weights[weights < np.sort(weights)[-top_k]] = 0
    p = weights / weights.sum()
    if top_p < 1:
        order = np.argsort(-p, kind="stable")
        last = order[np.searchsorted(np.cumsum(p[order]), top_p)]
        p[p < p[last]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


CASES = [
    (temperature, top_p, 0, 0.0) for temperature in (0.8, 0.9, 1.0, 1.1) for top_p in (0.5, 0.9, 1)
] + [(1.0, 1.0, 5, 0.0), (1.0, 1.0, 0, 0.2), (0.9, 0.8, 7, 0.05)]


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_exact_distribution(case):
    logits = np.random.default_rng(0).normal(size=24).astype(np.float32) * 1.5
    bits = jax.random.bits(jax.random.key(1), (DRAWS,))
    tokens, _ = jitted(jnp.tile(logits, (DRAWS, 1)), settings(DRAWS, *case), bits)
    expected = probabilities(logits, *case) * DRAWS
    counts = np.bincount(tokens, minlength=24)
    assert counts[expected == 0].sum() == 0
    likely = expected > 5
    assert likely.sum() > 1
    rest = expected[~likely].sum()
    observed, wanted = counts[likely], expected[likely]
    if rest:
        observed, wanted = np.append(observed, counts[~likely].sum()), np.append(wanted, rest)
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("vocabulary", [11, 1000, 20_000])
def test_each_draw_inverts_the_cdf(vocabulary):
    rows, rng = 64, np.random.default_rng(vocabulary)
    logits = rng.normal(size=(rows, vocabulary)) * rng.uniform(0.5, 5, (rows, 1))
    logits = logits.astype(np.float32)
    chosen = {
        "temperature": rng.choice([0.8, 1.0, 1.1, 0.0], rows),
        "top_p": rng.choice([0.5, 0.9, 0.99, 1.0], rows),
        "top_k": rng.choice([0, 0, 1, 10], rows),
        "min_p": rng.choice([0.0, 0.0, 0.05], rows),
    }
    bits = rng.integers(0, 2**32, rows, dtype=np.uint32)
    tokens, near = jitted(jnp.asarray(logits), settings(rows, **chosen), jnp.asarray(bits))
    for row in range(rows):
        temperature, *filters = (values[row] for values in chosen.values())
        if temperature == 0:
            assert tokens[row] == logits[row].argmax()
            continue
        p = probabilities(logits[row], temperature, *filters)
        expected = np.searchsorted(np.cumsum(p), bits[row] / 2**32, side="right")
        assert tokens[row] == expected or near[row]
    assert np.mean(near) < 0.3


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}])
def test_very_low_temperatures_are_greedy(filters, scale):
    rows, vocabulary, rng = 16, 300, np.random.default_rng(7)
    # No two are near: the likeliest leads by a thousand times the highest temperature.
    logits = rng.permuted(np.tile(np.arange(vocabulary), (rows, 1)), axis=1) * scale * 1e-2
    logits = jnp.asarray(logits - scale, jnp.float32)
    for temperature in (1e-45, 2e-38, 1e-36, 1e-30, 1e-20, 1e-8, 1e-6):
        bits = jnp.asarray(rng.integers(0, 2**32, rows, dtype=np.uint32))
        tokens, near = jitted(logits, settings(rows, temperature, **filters), bits)
        np.testing.assert_array_equal(tokens, np.argmax(logits, axis=1))
        assert not near.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("damage", ["nan", "inf", "all -inf", "all nan"])
def test_broken_logits_are_told_and_no_token(damage, temperature):
    where = slice(None) if "all" in damage else 5
    logits = jnp.zeros((4, 200)).at[0, where].set(float(damage.split()[-1]))
    logits = logits.at[1, 5].set(-np.inf)  # A token less, and nothing wrong.
    for rows in (4, 2):  # In blocks, and as a whole.
        options = settings(rows, temperature, top_p=0.9, top_k=3)
        tokens, near = jitted(logits[:rows], options, jnp.zeros(rows, jnp.uint32))
        assert tokens.tolist() == [BROKEN, *[0] * (rows - 1)]
        assert not near[0]


def test_the_same_tokens_are_kept_as_in_transformers():
    rows, grid = 40, 2**13
    rng = np.random.default_rng(3)
    bits = jnp.asarray((np.arange(grid) * (2**32 // grid)).astype(np.uint32))
    for _ in range(rows):
        logits = rng.normal(size=32).astype(np.float32)
        top_k, top_p, min_p = int(rng.integers(2, 20)), rng.uniform(0.3, 0.95), rng.uniform(0, 0.2)
        scores = torch.tensor(logits)[None]
        for filter_ in (
            logits_process.TopKLogitsWarper(top_k),
            logits_process.TopPLogitsWarper(top_p),
            logits_process.MinPLogitsWarper(min_p),
        ):
            scores = filter_(None, scores)
        tokens, _ = jitted(
            jnp.tile(logits, (grid, 1)), settings(grid, 1.0, top_p, top_k, min_p), bits
        )
        assert set(tokens.tolist()) == set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())


def test_equals_at_the_boundary_are_all_kept():
    logits = jnp.log(jnp.asarray([0.1, 0.2, 0.2, 0.4, 0.1]))
    bits = jnp.asarray(np.linspace(0, 2**32 - 1, 1024).astype(np.uint32))
    for options in ({"top_p": 0.5}, {"top_k": 2}):
        tokens, near = jitted(jnp.tile(logits, (1024, 1)), settings(1024, **options), bits)
        assert set(tokens.tolist()) == {1, 2, 3}
        # Rounding decides which of the equals is in, and so moves the draw by as much.
        assert near[np.isin(tokens, (1, 2))].all()


def test_greedy_takes_the_lowest_of_equals_and_says_so():
    logits = jnp.asarray([[0.0, 3.0, 3.0, 1.0], [0.0, 3.0, 2.9, 1.0]])
    tokens, near = jitted(logits, settings(2, temperature=0.0), jnp.zeros(2, jnp.uint32))
    assert tokens.tolist() == [1, 1]
    assert near.tolist() == [True, False]


def test_near_ties_lie_at_the_edges():
    logits = jnp.zeros((1, 4))
    for u, expected in ((0.25 + 5e-5, True), (0.25 - 5e-5, True), (0.25 + 2e-4, False), (0, False)):
        bits = jnp.asarray([round(u * 2**32)], jnp.uint32)
        token, near = jitted(logits, settings(1), bits)
        assert int(token[0]) == int(u * 4)
        assert bool(near[0]) == expected
    # 0.9 falls on an edge, so one token more may be kept, and each edge moves by up to as much.
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.1, 0.06, 0.04]]))
    for u, expected in ((0.5, True), (0.95, True), (0.3, False)):
        bits = jnp.asarray([round(u * 2**32)], jnp.uint32)
        assert bool(jitted(logits, settings(1, top_p=0.9), bits)[1][0]) == expected
        assert not jitted(logits, settings(1, top_p=0.85), bits)[1][0]


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(5)
    logits = jnp.asarray(rng.normal(size=(16, 500)), jnp.float32)
    bits = jnp.asarray(rng.integers(0, 2**32, 16, dtype=np.uint32))
    options = settings(16, rng.choice([0.0, 0.9, 1.1], 16), rng.choice([0.9, 1.0], 16))
    tokens, near = jitted(logits, options, bits)
    order = rng.permutation(16)
    moved = jax.tree.map(lambda x: x[order], (logits, options, bits))
    for found, expected in zip(jitted(*moved), (tokens, near), strict=True):
        np.testing.assert_array_equal(found, expected[order])


def test_repetition_penalty_equals_transformers():
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(3, 40)).astype(np.float32)
    ids = rng.integers(0, 40, (3, 10))
    seen = np.zeros((3, 40), bool)
    seen[np.arange(3)[:, None], ids] = True
    found = penalize_repetition(jnp.asarray(logits), jnp.asarray(seen), jnp.full(3, 1.3))
    expected = logits_process.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor(ids), torch.tensor(logits)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-6)
