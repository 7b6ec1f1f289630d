"""Losses of preference pairs: what a chosen response must gain over a rejected one.

Log-probabilities are [batch, 2] throughout: of the chosen response, then of the rejected one.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from expandr_jax.settings import NotNegative, Positive, number


@dataclasses.dataclass(frozen=True)
class PreferenceSettings:
    """What the losses can be set to; each reads what it needs. configs/base.py explains them."""

    beta: Positive = 0.1
    label_smoothing: Annotated[float, number(least=0, below=0.5)] = 0.0
    gamma: NotNegative = 0.5


Loss = Callable[[jax.Array, jax.Array | None, PreferenceSettings], jax.Array]


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A loss, and which log-probabilities it is of.

    Attributes:
        losses: (policy's, reference's, settings) -> [batch] losses.
        reference: The policy is compared with a reference; where not, there are none of it.
        per_token: Log-probabilities are means over a response's tokens, whatever the config says.
    """

    losses: Loss
    reference: bool = True
    per_token: bool = False


def log_ratios(policy: jax.Array, reference: jax.Array | None) -> jax.Array:
    """log pi - log ref of each response in float32; log pi alone where there is no reference."""
    return (policy if reference is None else policy - reference).astype(jnp.float32)


def log_ratio_margins(policy: jax.Array, reference: jax.Array | None) -> jax.Array:
    """h, [batch]: how much more the chosen response has gained than the rejected one."""
    ratios = log_ratios(policy, reference)
    return ratios[:, 0] - ratios[:, 1]


def _smoothed(margin: jax.Array, settings: PreferenceSettings) -> jax.Array:
    e = settings.label_smoothing
    return -(1 - e) * jax.nn.log_sigmoid(margin) - e * jax.nn.log_sigmoid(-margin)


def sigmoid(policy: jax.Array, reference: jax.Array, settings: PreferenceSettings) -> jax.Array:
    """-(1 - e) log s(beta h) - e log s(-beta h), with e the label smoothing.

    Rafailov et al., arXiv 2305.18290, equation 7.
    """
    return _smoothed(settings.beta * log_ratio_margins(policy, reference), settings)


def robust(policy: jax.Array, reference: jax.Array, settings: PreferenceSettings) -> jax.Array:
    """(-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e): unbiased under label noise e.

    Chowdhury et al., arXiv 2403.00409.
    """
    h = log_ratio_margins(policy, reference)
    kept, turned = jax.nn.log_sigmoid(settings.beta * h), jax.nn.log_sigmoid(-settings.beta * h)
    e = settings.label_smoothing
    return (-(1 - e) * kept + e * turned) / (1 - 2 * e)


def hinge(policy: jax.Array, reference: jax.Array, settings: PreferenceSettings) -> jax.Array:
    """max(0, 1 - beta h). SLiC: Zhao et al., arXiv 2305.10425."""
    return jax.nn.relu(1 - settings.beta * log_ratio_margins(policy, reference))


def ipo(policy: jax.Array, reference: jax.Array, settings: PreferenceSettings) -> jax.Array:
    """(h - 1 / (2 beta))^2. Azar et al., arXiv 2310.12036, equation 17."""
    return jnp.square(log_ratio_margins(policy, reference) - 1 / (2 * settings.beta))


def simpo(policy: jax.Array, reference: None, settings: PreferenceSettings) -> jax.Array:
    """`sigmoid` of beta h - gamma in place of beta h, of the policy's mean log-probabilities alone.

    SimPO: Meng et al., arXiv 2405.14734, equation 6; label smoothing as TRL has it.
    """
    margin = settings.beta * log_ratio_margins(policy, reference) - settings.gamma
    return _smoothed(margin, settings)


PREFERENCE_LOSSES = {
    "sigmoid": PreferenceLoss(sigmoid),
    "hinge": PreferenceLoss(hinge),
    "ipo": PreferenceLoss(ipo, per_token=True),
    "robust": PreferenceLoss(robust),
    "simpo": PreferenceLoss(simpo, reference=False, per_token=True),
}


def preference_metrics(
    policy: jax.Array, reference: jax.Array | None, beta: float
) -> dict[str, jax.Array]:
    """Metrics that are logged with any of these losses.

    {"reward_chosen", "reward_rejected", "margin", "accuracy", "kl"}, [batch] each. A reward is beta
    times a response's log-ratio to the reference; "kl" is the mean of both log-ratios, log pi - log
    ref, without beta. Over responses that the policy samples its mean is KL(pi || ref); over given
    ones, as here, it only estimates that, and may be below 0. Where log-probabilities are means
    over tokens, so is it. Without a reference a reward is beta times the log-probability, and there
    is no "kl".
    """
    ratios = log_ratios(policy, reference)
    chosen, rejected = ratios[:, 0], ratios[:, 1]
    h = chosen - rejected
    metrics = {
        "reward_chosen": beta * chosen,
        "reward_rejected": beta * rejected,
        "margin": beta * h,
        "accuracy": (h > 0).astype(jnp.float32),
    }
    return metrics if reference is None else {**metrics, "kl": (chosen + rejected) / 2}
