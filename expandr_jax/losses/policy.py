"""Losses of on-policy training, by the rewards of texts that the policy has sampled.

Arrays of tokens are [rows, tokens]. A row holds the responses to one prompt, one after the other;
`responses` says which one a token belongs to, from 1 on, and other numbers stand for padding.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.losses.language import response_sums
from expandr_jax.settings import NotNegative, Share

DEVIATION_FLOOR = 1e-4  # Added to a group's deviation, as in TRL.
MOST_LOG_RATIO = 20.0  # Above it exp overflows, and the slope would be 0 times inf.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """What the losses can be set to; configs/base.py explains them."""

    clip_low: Share | None = None
    clip_high: NotNegative | None = None
    kl_weight: NotNegative = 0.0
    kl_unbiased: bool = False
    entropy_weight: NotNegative = 0.0
    importance_cap: NotNegative = 0.0


# (log-probabilities, ratios to the policy that sampled, advantages, the ratios' lowest and highest
# value) -> the loss of each token, [rows, tokens] all.
TokenLoss = Callable[[jax.Array, jax.Array, jax.Array, float, float], jax.Array]


def outside(ratios, advantages, low, high):
    """Whether a ratio has gone so far in its advantage's direction that clipping holds it."""
    return jnp.where(advantages > 0, ratios > high, (advantages < 0) & (ratios < low))


def clipped(log_probs, ratios, advantages, low, high):
    """-min(r A, clip(r, low, high) A). PPO: Schulman et al., arXiv 1707.06347, equation 7."""
    held = jnp.clip(ratios, low, high)
    # The same as the least of both products, but a ratio on the border has its whole slope.
    return -jnp.where(outside(ratios, advantages, low, high), held, ratios) * advantages


def cispo(log_probs, ratios, advantages, low, high):
    """-sg(clip(r, low, high)) A log pi: clipped tokens go on learning, with a bounded weight.

    MiniMax-M1: arXiv 2506.13585, equation 4.
    """
    return -jax.lax.stop_gradient(jnp.clip(ratios, low, high)) * advantages * log_probs


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A loss, and what it is a mean of.

    Attributes:
        tokens: The loss of each token.
        advantage: How rewards become advantages, by its name in `ADVANTAGES`.
        reduction: What tokens' losses are summed by: "response", the mean of each response's mean;
            "length", the sum over the longest that responses can be; "batch", the mean over all
            tokens of an update.
        clip: How far the ratio may go below and above 1, where the settings leave it open.
        ratio: Whose the ratio is: a token's; "mean" or "sum" of its response's, that is, with the
            mean or the sum of the tokens' log-ratios.
    """

    tokens: TokenLoss
    advantage: Literal["deviation", "mean", "leave_one_out"]
    reduction: Literal["response", "length", "batch"]
    clip: tuple[float, float] = (0.2, 0.2)
    ratio: Literal["token", "mean", "sum"] = "token"


POLICY_LOSSES = {
    # Shao et al., arXiv 2402.03300, equation 3.
    "grpo": PolicyLoss(clipped, "deviation", "response"),
    # Liu et al., arXiv 2503.20783: neither the deviation nor a response's length divides.
    "dr_grpo": PolicyLoss(clipped, "mean", "length"),
    # Yu et al., arXiv 2503.14476, equations 8 to 12.
    "dapo": PolicyLoss(clipped, "deviation", "batch", clip=(0.2, 0.28)),
    # Zheng et al., arXiv 2507.18071, equations 5 and 7.
    "gspo": PolicyLoss(clipped, "deviation", "response", clip=(3e-4, 4e-4), ratio="mean"),
    # Ahmadian et al., arXiv 2402.14740: REINFORCE of whole responses with the others as baseline.
    "rloo": PolicyLoss(clipped, "leave_one_out", "response", ratio="sum"),
    # The paper sets no lower bound; arXiv 2510.13786 has an upper one of 4 to 8.
    "cispo": PolicyLoss(cispo, "deviation", "batch", clip=(1.0, 4.0)),
}


def _from_mean(rewards: np.ndarray) -> np.ndarray:
    return rewards - rewards.mean(axis=-1, keepdims=True)


def _per_deviation(rewards: np.ndarray) -> np.ndarray:
    deviation = rewards.std(axis=-1, ddof=1, keepdims=True)
    return _from_mean(rewards) / (deviation + DEVIATION_FLOOR)


def _from_others(rewards: np.ndarray) -> np.ndarray:
    count = rewards.shape[-1]
    return _from_mean(rewards) * (count / (count - 1))


# [groups, candidates] float64 rewards to advantages: less the group's mean, or the mean of the
# others; "deviation" divides that by the group's standard deviation (of a sample).
ADVANTAGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "deviation": _per_deviation,
    "mean": _from_mean,
    "leave_one_out": _from_others,
}


def advantages(rewards: np.ndarray, name: str) -> np.ndarray:
    """Advantages of the candidates of each group, [groups, candidates] float64, two or more each.

    Where all rewards of a group are equal they are exactly 0.
    """
    rewards = np.asarray(rewards, np.float64)
    equal = np.ptp(rewards, axis=-1, keepdims=True) == 0  # A rounded mean would not say so.
    return np.where(equal, 0.0, ADVANTAGES[name](rewards))


def token_weights(
    lengths: np.ndarray,
    learned: np.ndarray,
    reduction: str,
    most_tokens: int,
    used: np.ndarray | None = None,
) -> np.ndarray:
    """The weight of each token's loss, so that the mean over rows of its sums is the whole loss.

    Args:
        lengths: [rows, responses] number of tokens.
        learned: [rows, responses] bool: False for a response that nothing is learned from. In
            "response" and "length" it still counts as one, as in TRL.
        reduction: As `PolicyLoss` has it.
        most_tokens: The longest that a response can be.
        used: [rows] bool, the rows that count at all; None: all of them.

    Returns:
        [rows, responses] float64, the same for all tokens of a response.
    """
    lengths = np.asarray(lengths, np.float64)
    rows, count = lengths.shape
    learned = learned if used is None else learned & used[:, None]
    texts = count * (1.0 if used is None else max(1, int(used.sum())) / rows)
    weight = {
        "response": 1 / (texts * np.maximum(lengths, 1)),
        "length": np.full(lengths.shape, 1 / (texts * most_tokens)),
        "batch": np.full(lengths.shape, rows / max(1.0, float(np.sum(lengths * learned)))),
    }[reduction]
    return np.where(learned, weight, 0.0)


def k3(log_probs: jax.Array, reference: jax.Array) -> jax.Array:
    """exp(d) - d - 1 with d = log ref - log pi: KL(pi || ref) where pi sampled the tokens.

    It is never below 0. Schulman, "Approximating KL divergence" (2020).
    """
    difference = reference - log_probs
    return jnp.exp(difference) - difference - 1


def policy_losses(
    log_probs: jax.Array,
    entropies: jax.Array,
    batch: Mapping[str, jax.Array],
    *,
    loss: PolicyLoss,
    settings: PolicySettings,
    count: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of each row, whose mean over the rows of an update is what it lowers.

    Args:
        log_probs: [rows, tokens] of the policy that is trained.
        entropies: [rows, tokens] of its distribution at each token.
        batch: [rows, tokens] each: "responses"; "advantages"; "weights", from `token_weights`, and
            "means", the same of "batch". "sampled": the log-probabilities when the tokens were
            sampled. "old": those before the first update, where there are several; without it they
            are the policy's own. "reference": the base's, where there is one.
        loss: What is learned.
        settings: How.
        count: Responses of a row.

    Returns:
        [rows] losses; and metrics [rows], whose means over the rows are means over all tokens:
        "kl", "entropy", "clip_fraction", "mismatch" (of log-probabilities when training and when
        sampling), and "largest_mismatch", of which the largest counts.
    """
    real = batch["responses"] > 0

    def masked(values: jax.Array) -> jax.Array:
        return jnp.where(real, values.astype(jnp.float32), 0.0)

    log_probs, entropies = masked(log_probs), masked(entropies)
    frozen = jax.lax.stop_gradient(log_probs)
    old = masked(batch["old"]) if "old" in batch else frozen
    low, high = (given if given is not None else own for given, own in zip(
        (settings.clip_low, settings.clip_high), loss.clip, strict=True
    ))  # fmt: skip
    log_ratios = _log_ratios(log_probs - old, batch["responses"], loss.ratio, count)
    ratios = jnp.exp(jnp.minimum(log_ratios, MOST_LOG_RATIO))
    losses = loss.tokens(log_probs, ratios, batch["advantages"], 1 - low, 1 + high)
    mismatches = old - masked(batch["sampled"])
    metrics = {
        "entropy": entropies,
        "clip_fraction": outside(ratios, batch["advantages"], 1 - low, 1 + high),
        "mismatch": jnp.abs(mismatches),
    }
    if settings.importance_cap:
        # Truncated importance sampling, for what the program that sampled rounds otherwise.
        weights = jnp.exp(jnp.minimum(mismatches, jnp.log(settings.importance_cap)))
        losses = losses * weights
    if "reference" in batch:
        metrics["kl"] = k3(log_probs, masked(batch["reference"]))
        if settings.kl_weight:
            # Tokens are drawn from the policy, so that the KL's slope needs the ratio's, even where
            # it is 1: DeepSeek-V3.2, arXiv 2512.02556. The paper of GRPO leaves it out.
            factor = ratios if settings.kl_unbiased else 1.0
            losses = losses + settings.kl_weight * factor * metrics["kl"]
    total = jnp.sum(batch["weights"] * masked(losses), axis=1)
    if settings.entropy_weight:
        total = total - settings.entropy_weight * jnp.sum(batch["means"] * entropies, axis=1)
    largest = jnp.max(metrics["mismatch"], axis=1)
    metrics = {name: jnp.sum(batch["means"] * each, axis=1) for name, each in metrics.items()}
    return total, {**metrics, "largest_mismatch": largest}


def _log_ratios(log_ratios, responses, kind, count):
    """Each token's log-ratio, or in its place the mean or the sum of its response's."""
    if kind == "token":
        return log_ratios
    sums, tokens = response_sums(log_ratios, responses, count)
    of_response = sums / jnp.maximum(tokens, 1) if kind == "mean" else sums
    own = jnp.clip(responses - 1, 0, count - 1)
    return jnp.take_along_axis(of_response, own, axis=1)
