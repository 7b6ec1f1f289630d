"""Everything that step B can learn by, under the names that `dpo.loss` takes."""

from expandr_jax.objectives.preference import PREFERENCE_OBJECTIVES
from expandr_jax.objectives.reward_sft import REWARD_SFT

OBJECTIVES = {**PREFERENCE_OBJECTIVES, "reward-sft": REWARD_SFT}
