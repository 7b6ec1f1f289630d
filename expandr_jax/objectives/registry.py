"""Every kind of step B, and with them all that those learn which read a file of each round."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.policy import PolicyTrainer, policy_trainer
from expandr_jax.objectives.preference import PREFERENCE_OBJECTIVES
from expandr_jax.objectives.reward_sft import REWARD_SFT
from expandr_jax.pair import GeneratorModel


@dataclasses.dataclass(frozen=True)
class StepB:
    """A kind of step B: what programs and plans have to know of it, in place of its name.

    Attributes:
        phase: What its training is called in timings, metrics and messages.
        section: The section of the config that it learns by.
        rewarded: The section by which the texts are sampled that are rewarded.
        objectives: What it may learn of a file of each round, by name; where there are several, the
            first section's `loss` says which. None where texts are sampled, rewarded and learned
            from in each step.
        trainer: (the generator, the first section) -> what learns in such steps; None where it
            reads a file.
    """

    phase: str
    section: str
    rewarded: str
    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=dict)
    trainer: Callable[[GeneratorModel, Any], PolicyTrainer] | None = None

    @property
    def on_policy(self) -> bool:
        """Whether it samples in its steps."""
        return not self.objectives

    def objective(self, settings: Any) -> Objective | None:
        """What it learns of a file, by its section of the config; None on-policy."""
        if len(self.objectives) > 1:
            return self.objectives[settings.loss]
        return next(iter(self.objectives.values()), None)


# What `step_b` takes.
STEP_B = {
    "dpo": StepB("DPO", "dpo", "candidates", PREFERENCE_OBJECTIVES),
    "reward-sft": StepB("reward-sft", "dpo", "candidates", {REWARD_SFT.name: REWARD_SFT}),
    "grpo": StepB("GRPO", "grpo", "grpo", trainer=policy_trainer),
}
OBJECTIVES = {name: o for kind in STEP_B.values() for name, o in kind.objectives.items()}


def on_policy_phases() -> set[str]:
    """What metrics call the trainings that sample in their steps."""
    return {kind.phase for kind in STEP_B.values() if kind.on_policy}
