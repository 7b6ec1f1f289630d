"""Every kind of step B, and everything that those learn by which read a file of each round."""

import dataclasses
from collections.abc import Callable
from typing import Any

from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.policy import PolicyTrainer, policy_trainer
from expandr_jax.objectives.preference import PREFERENCE_OBJECTIVES
from expandr_jax.objectives.reward_sft import REWARD_SFT
from expandr_jax.pair import GeneratorModel

OBJECTIVES = {**PREFERENCE_OBJECTIVES, REWARD_SFT.name: REWARD_SFT}


@dataclasses.dataclass(frozen=True)
class StepB:
    """A kind of step B: what programs and plans have to know of it, in place of its name.

    Attributes:
        phase: What its training is called in timings, metrics and messages.
        section: The section of the config that it learns by.
        rewarded: The section by which the texts are sampled that are rewarded.
        objective: The first section -> what is learned of a file of each round; None where texts
            are sampled, rewarded and learned from in each step.
        trainer: (the generator, the first section) -> what learns in such steps; None where it
            reads a file.
    """

    phase: str
    section: str
    rewarded: str
    objective: Callable[[Any], Objective] | None = None
    trainer: Callable[[GeneratorModel, Any], PolicyTrainer] | None = None

    @property
    def on_policy(self) -> bool:
        """Whether it samples in its steps."""
        return self.objective is None


# What `step_b` takes.
STEP_B = {
    "dpo": StepB("DPO", "dpo", "candidates", lambda settings: PREFERENCE_OBJECTIVES[settings.loss]),
    "reward-sft": StepB("reward-sft", "dpo", "candidates", lambda _: REWARD_SFT),
    "grpo": StepB("GRPO", "grpo", "grpo", trainer=policy_trainer),
}
