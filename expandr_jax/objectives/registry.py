"""Everything that step B can learn by from files of a round."""

from typing import Any

from expandr_jax.objectives.preference import PREFERENCE_OBJECTIVES
from expandr_jax.objectives.reward_sft import REWARD_SFT

OBJECTIVES = {**PREFERENCE_OBJECTIVES, "reward-sft": REWARD_SFT}
STEP_B = ("dpo", "reward-sft", "grpo")  # What `step_b` takes; the last reads no files.


def objective_name(config: Any) -> str:
    """Which of `OBJECTIVES` the whole config learns by; "grpo" is none of them."""
    return config.dpo.loss if config.step_b == "dpo" else config.step_b
