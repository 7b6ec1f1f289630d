"""Detects that on-policy training has collapsed, before its texts show it."""

from collections.abc import Callable, Mapping, Sequence

from expandr_jax.objectives.settings import GrpoSettings

FIRST_STEPS = 5  # Steps at the beginning whose mean is what later ones are compared with.
# A step's mean reward may lie so many of its standard errors below the start's: other queries were
# drawn. Where these differ more than texts of one do, that is more than any deviation of the texts.
STANDARD_ERRORS = 2
# Metrics of a step that the watch looks at.
WATCHED = ("kl", "entropy", "repetitive", "reward", "reward_deviation", "reward_error")

StepMetrics = Mapping[str, float]


def collapsed(rows: Sequence[StepMetrics], settings: GrpoSettings, section: str) -> str | None:
    """The reason why training counts as collapsed, or None.

    A limit counts where each of the last `watch_steps` steps was beyond it: single steps are noisy.

    Args:
        rows: `WATCHED` of all steps so far, the first one's first.
        settings: How it is trained, and watched.
        section: What the config calls that.
    """
    last = rows[-settings.watch_steps :]
    if len(rows) < FIRST_STEPS + settings.watch_steps:
        return None
    # A run that began before there were standard errors goes on without.
    start = {
        name: sum(row.get(name, 0.0) for row in rows[:FIRST_STEPS]) / FIRST_STEPS
        for name in WATCHED
    }
    low, high = (bound * start["entropy"] for bound in settings.watch_entropy)
    repetitive = start["repetitive"] + settings.watch_repetitive
    margin = settings.watch_reward * start["reward_deviation"]
    reward = start["reward"] - max(margin, STANDARD_ERRORS * start["reward_error"])
    # The first step's is that of what training began with, which a warm start has moved already.
    kl, now = rows[0]["kl"] + settings.watch_kl, last[-1]
    limits: dict[str, Callable[[StepMetrics], bool]] = {
        f"KL to the base {now['kl']:.3g} nats a token, above {kl:.3g} ({section}.watch_kl over the "
        "first step's)": lambda row: row["kl"] > kl,
        f"entropy {now['entropy']:.3g} nats a token, {start['entropy']:.3g} at the start; "
        f"{section}.watch_entropy allows {low:.3g} to {high:.3g}": (
            lambda row: not low <= row["entropy"] <= high
        ),
        f"share of repetitive texts {now['repetitive']:.3g}, above {repetitive:.3g} "
        f"({section}.watch_repetitive over the start's)": (
            lambda row: row["repetitive"] > repetitive
        ),
        f"reward {now['reward']:.4g}, below {reward:.4g} ({section}.watch_reward deviations, and "
        f"{STANDARD_ERRORS} standard errors, under the start's)": lambda row: (
            row["reward"] < reward
        ),
    }
    return next((why for why, beyond in limits.items() if all(map(beyond, last))), None)
