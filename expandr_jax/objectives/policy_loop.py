"""The steps of on-policy training: what each samples and learns, and where it collapses."""

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax

from expandr_jax.files.records import write_jsonl
from expandr_jax.objectives.policy import PolicyTrainer, pack_sampled
from expandr_jax.objectives.rollouts import Rollouts
from expandr_jax.objectives.settings import GrpoSettings
from expandr_jax.objectives.watch import WATCHED, collapsed
from expandr_jax.pair import GeneratorModel
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.telemetry import Contents, TrainingLog
from expandr_jax.sharding import whole
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.flops import FROZEN, forward_flops
from expandr_jax.training.loop import fit
from expandr_jax.training.train_state import TrainState

MOST_BACKS = 5  # Times that training goes back to a good adapter; then it ends all the same.


@dataclasses.dataclass
class Collapsed(Exception):
    """Raised out of the loop: the step at which training has collapsed, why, and the adapter."""

    step: int
    why: str
    adapter: Any


class PolicyLoop:
    """Steps of on-policy training, watched.

    Args:
        log: Where they are recorded.
        model: The generator and its mesh.
        settings, section: How it is trained, and what the config calls that.
        trainer: What learns.
        rollouts: Gives what samples and rewards, when a step first asks for it.
        watched: The journal of what the watch has seen of each step.
        collapses: The journal of the collapses after which training went back.
        show: (step, adapter) writes texts of it; called at the first step, midway and at the end,
            by all processes together.

    Attributes:
        show: The same.
    """

    def __init__(
        self,
        log: TrainingLog,
        model: GeneratorModel,
        settings: GrpoSettings,
        section: str,
        trainer: PolicyTrainer,
        rollouts: Callable[[], Rollouts],
        watched: CommonJournal,
        collapses: CommonJournal,
        show: Callable[[int, Any], None],
    ):
        self._log, self._generator = log, model.generator
        self._params = model.generator_params
        self._settings, self._section = settings, section
        self._trainer, self._rollouts, self.show = trainer, rollouts, show
        self._watched, self._collapses = watched, collapses

    def fit(self, adapter: Any, checkpoints: Checkpoints) -> Any:
        """The adapter after the last step, on the mesh.

        Raises:
            Collapsed: The watch says so.
            UserError: A loss is not finite.
        """
        state = fit(
            self._log,
            self._trainer.setup.create(adapter),
            self._learn,
            self._sample,
            first_step=0,
            steps=self._settings.steps,
            checkpoints=checkpoints,
            save_every=self._settings.save_every,
            on_policy=True,
        )
        if not self._watched.finished:
            self.show(self._settings.steps, state.params)
            self._watched.finish()
        return state.params

    def last_good(
        self, collapse: Collapsed, adapter: Any, checkpoints: Checkpoints
    ) -> tuple[int, Any]:
        """The last step before a collapse whose adapter was good, and that; 0: the one at first."""
        checkpoints.wait()
        template = self._trainer.setup.create(adapter)
        good = max(0, collapse.step + 1 - self._settings.watch_steps)
        step, state = checkpoints.restore(template, at_most=good) or (0, template)
        return step, state.params

    @property
    def may_go_back(self) -> bool:
        """Whether training goes on from a good adapter, as the settings have it."""
        back = self._settings.on_collapse == "back"
        return back and len(self._collapses.rows) < MOST_BACKS

    def go_back(self, collapse: Collapsed, step: int, checkpoints: Checkpoints) -> None:
        """Forgets what came after a step; the rate is half of what it was from there."""
        checkpoints.forget(step)
        self._collapses.append([{"step": collapse.step, "why": collapse.why, "to": step}])

    def _sample(self, step: int, state: TrainState) -> tuple[Any, Contents]:
        """What a step learns from, on the host, and what it is made of."""
        if step in (0, self._settings.steps // 2):
            self.show(step, state.params)
        rollouts = self._rollouts()
        rollout = rollouts.sample(step, whole(state.params))
        settings, groups = self._settings, rollout.groups
        size = settings.groups // settings.minibatches
        packed = [
            pack_sampled(
                groups[first : first + size], settings, self._generator.pad_id, rollouts.sizes
            )
            for first in range(0, len(groups), size)
        ]
        sizes = [(len(g.prompt), sum(len(c.tokens) for c in g.group.candidates)) for g in groups]
        module = self._generator.module
        contents = Contents(
            [g.group.query_id for g in groups],
            sum(map(sum, sizes)),
            settings.passes * sum(
                FROZEN * forward_flops(module, self._params, 1, prompt + texts, logits=texts)
                for prompt, texts in sizes
            ),
            dict(rollout.seconds),
        )  # fmt: skip
        return (step, packed, rollout.statistics, contents.seconds), contents

    def _learn(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        """The state after a step, and all that is logged of it; raises Collapsed."""
        step, packed, statistics, seconds = batch
        begin, trainer = time.perf_counter(), self._trainer
        known = {} if self._settings.kl_weight else {"kl": trainer.kl(packed[0])}
        rate = 0.5 ** len(self._collapses.rows)
        state, metrics = trainer.learn(state, trainer.batches(state.params, packed), rate)
        jax.block_until_ready(state)
        seconds["update_seconds"] = time.perf_counter() - begin
        metrics = {**metrics, **known, **statistics}
        row = {name: float(metrics[name]) for name in WATCHED}
        if len(self._watched.rows) > step:
            self._watched.keep(step)
        self._watched.append([row])
        why = collapsed(self._watched.rows, self._settings, self._section)
        if why:
            raise Collapsed(step, why, state.params)
        return state, metrics


def write_probe(rollouts: Rollouts, adapter: Any, path: pathlib.Path, processes: Processes) -> None:
    """Writes texts of an adapter beside their rewards; all processes call it together."""
    groups = rollouts.probe(whole(adapter))
    rows = (
        {
            "query_id": each.group.query_id, "query": each.group.query, "text": c.text,
            "reward": c.total, "reward_terms": dict(c.rewards),
            **({"is_document": True} if each.group.is_document else {}),
        }
        for each in groups
        for c in each.group.candidates
    )  # fmt: skip
    processes.once(lambda: write_jsonl(path, rows))
