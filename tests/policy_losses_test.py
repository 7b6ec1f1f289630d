"""The losses of on-policy training: the papers' equations in loops, and examples worked by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from expandr_jax.losses.policy import (
    POLICY_LOSSES,
    PolicySettings,
    advantages,
    k3,
    policy_losses,
    token_weights,
)

LONGEST = 9  # The longest that a response can be: what Dr. GRPO divides by.
LENGTHS = ((3, 1, 5), (2, 9, 4), (1, 1, 0))  # Tokens of each response of each row.
WIDTH = 18  # Of a row: no row is full.
CLIPS = {
    "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4),
    "rloo": (0.2, 0.2), "cispo": (1.0, 4.0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Response:
    """A response's numbers, [tokens] each, its advantage, and whether anything is learned of it."""

    log_probs: np.ndarray
    old: np.ndarray
    sampled: np.ndarray
    reference: np.ndarray
    entropies: np.ndarray
    advantage: float
    learned: bool


def random_rows(spread=0.4, seed=0):
    """Rows of responses whose ratios lie on both sides of every loss's borders."""
    rng = np.random.default_rng(seed)

    def response(length, learned):
        old = -rng.uniform(0.5, 4, length)
        near = [old + spread * rng.normal(size=length) for _ in range(3)]
        return Response(near[0], old, *near[1:], rng.uniform(0, 3, length), rng.normal(), learned)

    return [
        [response(length, (row, i) != (1, 0)) for i, length in enumerate(lengths)]
        for row, lengths in enumerate(LENGTHS)
    ]


def packed(rows, reduction, names=("sampled", "old", "reference")):
    """(log-probabilities, entropies, batch) as `policy_losses` has them; nan where nothing is."""
    shape = len(rows), WIDTH
    lengths = np.array([[len(r.log_probs) for r in row] for row in rows])
    learned = np.array([[r.learned for r in row] for row in rows])
    made = {name: np.full(shape, np.nan) for name in ("log_probs", "entropies", *names)}
    made |= {name: np.zeros(shape) for name in ("advantages", "weights", "means")}
    made["responses"] = np.full(shape, -1)
    weights = token_weights(lengths, learned, reduction, LONGEST)
    means = token_weights(lengths, learned, "batch", LONGEST)
    for number, row in enumerate(rows):
        end = 0
        for i, response in enumerate(row):
            span = number, slice(end, end + len(response.log_probs))
            for name in ("log_probs", "entropies", *names):
                made[name][span] = getattr(response, name)
            made["advantages"][span] = response.advantage
            made["weights"][span], made["means"][span] = weights[number, i], means[number, i]
            made["responses"][span] = i + 1
            end += len(response.log_probs)
    return made.pop("log_probs"), made.pop("entropies"), made


def ours(name, rows, names=("sampled", "old", "reference"), **settings):
    """An update's loss, its slope in each response's log-probabilities, and metrics."""
    loss = POLICY_LOSSES[name]
    log_probs, entropies, batch = packed(rows, loss.reduction, names)

    def whole(log_probs):
        losses, metrics = policy_losses(
            log_probs, entropies, batch, loss=loss, settings=PolicySettings(**settings), count=3
        )
        assert losses.shape == (len(rows),)
        return jnp.mean(losses), metrics

    (value, metrics), slopes = jax.value_and_grad(whole, has_aux=True)(jnp.asarray(log_probs))
    slopes, numbers = np.asarray(slopes), batch["responses"]
    np.testing.assert_array_equal(slopes[numbers < 0], 0)  # Of padding, whatever stands there.
    each = [
        [slopes[row, numbers[row] == i + 1] for i in range(len(responses))]
        for row, responses in enumerate(rows)
    ]
    return float(value), each, metrics


def token_losses(name, response, low, high):
    """Each token's loss, and its slope in each token's log-probability, [token, token].

    They are of the papers' equations, one token after the other.
    """
    a, tokens = response.advantage, len(response.log_probs)
    ratios = [math.exp(x) for x in response.log_probs - response.old]
    losses, slopes = np.zeros(tokens), np.zeros((tokens, tokens))
    for t in range(tokens):
        if name == "cispo":
            weight = min(max(ratios[t], 1 - low), 1 + high)
            losses[t] = -weight * a * response.log_probs[t]
            slopes[t, t] = -weight * a
            continue
        share = {t: 1.0}  # What each token's log-probability has in the ratio's logarithm.
        if name == "gspo":
            share = dict.fromkeys(range(tokens), 1 / tokens)
        elif name == "rloo":
            share = dict.fromkeys(range(tokens), 1.0)
        ratio = math.prod(ratios[i] ** part for i, part in share.items())
        losses[t] = -min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
        if losses[t] == -ratio * a:
            for i, part in share.items():
                slopes[t, i] = -part * ratio * a
    return losses, slopes


def twin(name, rows, *, kl_weight=0.0, entropy_weight=0.0, importance_cap=0.0, clip=None):
    """What `ours` gives, but metrics: one response after the other, in float64."""
    low, high = clip or CLIPS[name]
    responses = [response for row in rows for response in row]
    learned = [r for r in responses if r.learned]
    everything = sum(len(r.log_probs) for r in learned)
    total, slopes = 0.0, []
    for response in responses:
        tokens = len(response.log_probs)
        losses, slope = token_losses(name, response, low, high)
        if importance_cap:
            weight = np.minimum(np.exp(response.old - response.sampled), importance_cap)
            losses, slope = weight * losses, weight[:, None] * slope
        apart = response.reference - response.log_probs
        losses = losses + kl_weight * (np.exp(apart) - apart - 1)
        slope = slope + kl_weight * np.diag(1 - np.exp(apart))
        divisor = {
            "grpo": len(responses) * tokens, "gspo": len(responses) * tokens,
            "rloo": len(responses) * tokens, "dr_grpo": len(responses) * LONGEST,
            "dapo": everything, "cispo": everything,
        }[name]  # fmt: skip
        part = 1 / divisor if response.learned and tokens else 0.0
        total += part * losses.sum()
        slopes.append(part * slope.sum(axis=0))
    entropy = sum(r.entropies.sum() for r in learned) / everything
    by_row = iter(slopes)
    return total - entropy_weight * entropy, [[next(by_row) for _ in row] for row in rows]


def assert_equal(found, expected):
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        for slope, twin_slope in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(slope, twin_slope, rtol=2e-5, atol=1e-8)


SETTINGS = {
    "plain": {},
    "kl": {"kl_weight": 0.3},
    "entropy": {"entropy_weight": 0.2},
    "importance": {"importance_cap": 1.1},
    "all": {"kl_weight": 0.1, "entropy_weight": 0.05, "importance_cap": 2.0},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_losses_and_slopes_are_those_of_the_papers_equations(name, settings):
    options, held = SETTINGS[settings], []
    for seed in range(4):
        rows = random_rows(seed=seed)
        found = ours(name, rows, **options)
        assert_equal(found, twin(name, rows, **options))
        held.append(float(np.mean(found[2]["clip_fraction"])))
    if name != "cispo":
        assert 0 < np.mean(held) < 1


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_clipping_can_be_set(name):
    wider = []
    for seed in range(4):
        rows = random_rows(seed=seed)
        found = ours(name, rows, clip_low=0.1, clip_high=0.5)
        assert_equal(found, twin(name, rows, clip=(0.1, 0.5)))
        wider.append(abs(found[0] - ours(name, rows)[0]))
    assert max(wider) > 1e-2


def test_numbers_that_are_not_there_are_those_of_the_policy_itself():
    rows = random_rows()
    same = [[dataclasses.replace(r, old=r.log_probs) for r in row] for row in rows]
    for name in POLICY_LOSSES:
        found = ours(name, rows, ("sampled",), importance_cap=1.5)
        assert_equal(found, twin(name, same, importance_cap=1.5))
        assert "kl" not in found[2]


@pytest.mark.parametrize("clip", [{}, {"clip_low": 0.0, "clip_high": 0.0}])
@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_where_nothing_was_learned_yet_the_slope_is_the_policy_gradient(name, clip):
    """-A of a token's log-probability, by its weight, wherever the ratio is 1."""
    if clip and name == "cispo":
        clip = {"clip_high": 0.0}
    rows = [[dataclasses.replace(r, old=r.log_probs) for r in row] for row in random_rows()]
    loss = POLICY_LOSSES[name]
    log_probs, _, batch = packed(rows, loss.reduction)

    def reinforce(log_probs):
        own = jnp.where(batch["responses"] > 0, log_probs, 0.0)
        return -jnp.mean(jnp.sum(batch["weights"] * batch["advantages"] * own, axis=1))

    expected = jax.grad(reinforce)(jnp.asarray(log_probs))
    # Each of a response's tokens has the response's ratio, to which all of them have their part.
    factors = {"token": lambda n: 1, "mean": lambda n: 1, "sum": lambda n: n}[loss.ratio]
    for names in (("sampled", "old"), ("sampled",)):
        slopes = ours(name, rows, names, **clip)[1]
        for row, each in enumerate(slopes):
            for i, slope in enumerate(each):
                own = np.asarray(expected)[row, batch["responses"][row] == i + 1]
                np.testing.assert_allclose(slope, own * factors(len(own)), rtol=1e-5)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_groups_whose_rewards_are_all_equal_teach_exactly_nothing(name):
    rewards = np.full((3, 3), 0.1)  # The mean of three is rounded to another number.
    found = advantages(rewards, POLICY_LOSSES[name].advantage)
    rows = [
        [dataclasses.replace(r, advantage=a) for r, a in zip(row, given, strict=True)]
        for row, given in zip(random_rows(), found, strict=True)
    ]
    for each in ours(name, rows, importance_cap=2.0)[1]:
        for slope in each:
            np.testing.assert_array_equal(slope, 0)


def test_advantages_literal_constants():
    rewards = np.array([[1.0, 2.0, 3.0, 6.0], [0.5, 0.5, 0.5, 0.5]])
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)  # Of a sample: 3, and not 4, divides.
    expected = {
        "mean": [-2, -1, 0, 3],
        "deviation": [x / (deviation + 1e-4) for x in (-2, -1, 0, 3)],
        "leave_one_out": [1 - 11 / 3, 2 - 10 / 3, 3 - 9 / 3, 6 - 6 / 3],
    }
    for name, first in expected.items():
        np.testing.assert_allclose(advantages(rewards, name), [first, [0] * 4], rtol=1e-12)
    assert expected["deviation"][3] == pytest.approx(1.3886, abs=1e-4)
    assert {name: loss.advantage for name, loss in POLICY_LOSSES.items()} == {
        "grpo": "deviation", "dr_grpo": "mean", "dapo": "deviation", "gspo": "deviation",
        "rloo": "leave_one_out", "cispo": "deviation",
    }  # fmt: skip


def test_token_weights_literal_constants():
    lengths, learned = [[2, 4], [1, 0]], [[True, True], [False, True]]
    expected = {
        "response": [[1 / 4, 1 / 8], [0, 1 / 2]],  # A response that has no tokens has no weight.
        "length": [[1 / 20, 1 / 20], [0, 1 / 20]],
        "batch": [[2 / 6, 2 / 6], [0, 2 / 6]],
    }
    for reduction, weights in expected.items():
        found = token_weights(np.array(lengths), np.array(learned), reduction, 10)
        np.testing.assert_allclose(found, weights, rtol=1e-12)
    used = np.array([True, False])  # The second row does not count, not even as two texts.
    expected = {
        "response": [[1 / 2, 1 / 4], [0, 0]],
        "length": [[1 / 10, 1 / 10], [0, 0]],
        "batch": [[2 / 6, 2 / 6], [0, 0]],
    }
    for reduction, weights in expected.items():
        found = token_weights(np.array(lengths), np.array(learned), reduction, 10, used)
        np.testing.assert_allclose(found, weights, rtol=1e-12)
    nothing = token_weights(np.array(lengths), np.zeros((2, 2), bool), "batch", 10)
    np.testing.assert_array_equal(nothing, 0)


def one_token(name, ratio, advantage, **settings):
    """The loss of one token, its slope, and the metrics, its log-probability being -1."""
    old, zero = np.array([-1 - math.log(ratio)]), np.zeros(1)
    rows = [[Response(np.array([-1.0]), old, old, zero, zero, advantage, True)]]
    value, slopes, metrics = ours(name, rows, **settings)
    return value, float(slopes[0][0][0]), {k: float(v[0]) for k, v in metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "held"),
    [
        (1.5, 2.0, -2.4, 0.0, 1),  # Likelier than 1.2 times is enough.
        (1.5, -2.0, 3.0, 3.0, 0),  # The wrong way: no clipping.
        (0.5, 2.0, -1.0, -1.0, 0),
        (0.5, -2.0, 1.6, 0.0, 1),
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 0.0, 0.0, 0.0, 0),
    ],
)
def test_clipping_literal_constants(ratio, advantage, loss, slope, held):
    for name in ("grpo", "rloo"):
        found = one_token(name, ratio, advantage)
        np.testing.assert_allclose(found[:2], (loss, slope), rtol=1e-5)
        assert found[2]["clip_fraction"] == held


def test_other_borders_literal_constants():
    assert one_token("dapo", 1.25, 1.0)[1] == pytest.approx(-1.25, rel=1e-5)  # 1.28 is far off.
    assert one_token("grpo", 1.25, 1.0)[1] == 0
    assert one_token("gspo", 1.001, 1.0)[:2] == pytest.approx((-1.0004, 0))
    # CISPO's tokens learn on, with the border's weight: -5 A log pi, and that is -1.
    assert one_token("cispo", 7.0, 1.0)[:2] == pytest.approx((5.0, -5.0), rel=1e-5)
    assert one_token("cispo", 0.01, -1.0)[:2] == pytest.approx((-0.01, 0.01), rel=1e-5)


def test_what_became_far_likelier_leaves_numbers_finite():
    """exp overflows in float32 beyond 88, and a slope of 0 times inf is no number."""
    for name in POLICY_LOSSES:
        rows = [
            [Response(np.full(5, -1.0), *[np.full(5, -60.0)] * 2, *[np.zeros(5)] * 2, a, True)]
            for a in (1.0, -1.0)
        ]
        value, slopes, _ = ours(name, rows, ("sampled", "old"))
        assert np.isfinite(value)
        assert all(np.isfinite(each).all() for row in slopes for each in row)


def test_k3_literal_constants():
    log_probs = jnp.log(jnp.array([0.5, 0.25, 0.5]))
    reference = jnp.log(jnp.array([0.25, 0.5, 0.5]))
    found = k3(log_probs, reference)
    np.testing.assert_allclose(found, [0.5 + math.log(2) - 1, 2 - math.log(2) - 1, 0], atol=1e-6)
    # Of two tokens with shares 0.5 each under the policy, its mean is KL(policy || reference).
    policy, base = np.array([0.5, 0.5]), np.array([0.2, 0.8])
    mean = np.sum(policy * k3(jnp.log(policy), jnp.log(base)))
    np.testing.assert_allclose(mean, np.sum(policy * np.log(policy / base)), rtol=1e-5)


def test_metrics_are_means_over_the_tokens_that_are_learned():
    rows = random_rows()
    metrics = ours("grpo", rows)[2]
    learned = [r for row in rows for r in row if r.learned]

    def mean(of):
        return np.mean(np.concatenate([of(r) for r in learned]))

    apart = [r.reference - r.log_probs for r in learned]
    expected = {
        "kl": np.mean(np.concatenate([np.exp(d) - d - 1 for d in apart])),
        "entropy": mean(lambda r: r.entropies),
        "mismatch": mean(lambda r: np.abs(r.old - r.sampled)),
        "clip_fraction": mean(
            lambda r: np.where(
                r.advantage > 0,
                np.exp(r.log_probs - r.old) > 1.2,
                np.exp(r.log_probs - r.old) < 0.8,
            )
        ),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(np.mean(metrics[name]), value, rtol=1e-5, err_msg=name)
    largest = max(np.abs(r.old - r.sampled).max(initial=0) for row in rows for r in row)
    np.testing.assert_allclose(np.max(metrics["largest_mismatch"]), largest, rtol=1e-5)
