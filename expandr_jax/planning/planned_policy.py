"""The programs of on-policy training, as shapes: sampling a step's texts, and learning of them.

Sampling and training alternate, so that each is planned beside what the other one keeps.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.config import Config
from expandr_jax.generation.sampler import slots_of_a_process
from expandr_jax.objectives.policy import (
    PolicyTrainer,
    Sampled,
    kl_rows,
    micro_rows,
    pack_sampled,
    row_sizes_of,
)
from expandr_jax.pair import GeneratorModel
from expandr_jax.planning.planned import (
    PAPER,
    PROMPT_TOKENS,
    REFERENCE,
    Calls,
    Planned,
    planned_mesh,
    random_tokens,
    untrained,
)
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_moves import restored
from expandr_jax.planning.topology import Topology
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.sharding import batch_sharding, bytes_on_device, with_shardings
from expandr_jax.training.flops import FROZEN

POLICY_DECODE, POLICY_STEP = "policy decode", "policy step"
OLD = "old log-probabilities"


class PolicyShapes:
    """Makes the programs of on-policy training with the config's generator for a topology.

    Attributes:
        update: The program that stands for it.
    """

    update = POLICY_STEP

    def __init__(self, config: Config, topology: Topology, generator: GeneratorShapes):
        self._config, self._topology, self._generator = config, topology, generator
        self._settings, self._section = config.learned, config.step_b_kind.section
        self._change = (
            f"a larger {self._section}.accumulation or a smaller {self._section}.chunk, or more "
            "fsdp in mesh.dpo"
        )

    @property
    def rewarded_rows(self) -> int:
        """Candidates that are rewarded together."""
        return self._settings.queries * self._settings.samples

    def held(self) -> int:
        """Bytes a device that stay for it, beside both models, while texts are rewarded: the engine
        waits for the next step."""
        return self._engine_bytes() + self._state_bytes()

    def sampling(self) -> dict[str, Callable[[], Planned]]:
        """What samples its texts otherwise than the generator's own programs do, by name."""
        return {POLICY_DECODE: self._decode}

    @staticmethod
    def paper_calls(calls: Calls, config: Config) -> list[tuple[str, str, int]]:
        """(part, program, calls) of its programs in the paper's run: each query in one step."""
        phase, settings = config.step_b_kind.phase, config.learned
        steps = math.ceil(PAPER["queries"] / settings.queries)
        parts = steps * settings.minibatches * settings.accumulation
        decoded = calls(POLICY_DECODE, settings.texts) * settings.max_new_tokens
        return [
            ("candidates", POLICY_DECODE, steps * decoded),
            (phase, REFERENCE, parts if settings.kl_weight else steps),
            *([(phase, OLD, parts)] if settings.updates > 1 else []),
            (phase, POLICY_STEP, settings.passes * parts),
        ]

    def _engine(self) -> tuple[int, int, bool]:
        """Slots of a process, tokens of a text, and that log-probabilities are kept."""
        settings, hosts = self._settings, self._topology.hosts
        mesh = planned_mesh(self._config, "sampling", self._topology)
        slots = slots_of_a_process(self._config.generator, mesh, settings.texts, hosts)
        return slots, settings.max_new_tokens, True

    def _decode(self) -> Planned:
        """One token for each slot that a step's texts have, beside the base as training has it."""
        fewer = f"{self._section}.queries or {self._section}.samples"
        return self._generator.decode(*self._engine(), fewer=fewer).beside(self._state_bytes())

    def _engine_bytes(self) -> int:
        """Bytes a device of what stays of sampling while a step is rewarded and learned from.

        The slots are made anew for each step; the weights, layer by layer, are not.
        """
        return bytes_on_device(self._generator.engine(*self._engine())[1])

    @functools.cached_property
    def _model(self) -> GeneratorModel:
        return self._generator.model()

    @functools.cached_property
    def _trainer(self) -> PolicyTrainer:
        return self._config.step_b_kind.trainer(self._model, self._settings)

    def _state(self) -> Any:
        return self._trainer.setup.shapes(self._generator.adapter)

    def _state_bytes(self) -> int:
        """Bytes a device of the adapter that is trained, and of its optimizer."""
        return bytes_on_device(self._state())

    def restore(self) -> Planned:
        """The check of the trained state when it is read from a checkpoint."""
        model = self._model
        return restored(self._state(), model.dpo_mesh, self._topology, self._generator.module)

    def learning(self) -> dict[str, Callable[[], Planned]]:
        """The programs that train on a step's texts, by name; the base is an argument of each.

        The KL to the base is looked at where nothing is learned of it, of a part of an update.
        """
        old = {OLD: self._old} if self._settings.updates > 1 else {}
        programs = {REFERENCE: self._reference, **old, POLICY_STEP: self._step}

        def beside(make: Callable[[], Planned]) -> Callable[[], Planned]:
            return lambda: make().beside(self._engine_bytes())

        return {name: beside(make) for name, make in programs.items()}

    @functools.cached_property
    def _micro_batch(self) -> dict[str, np.ndarray]:
        """Texts of random tokens, all as long as they may be."""
        settings, module = self._settings, self._generator.module
        rows = micro_rows(settings, self._section, self._model.dpo_mesh)
        new, samples = settings.max_new_tokens, settings.samples
        rewards = np.random.default_rng(0).random((rows, samples))
        sampled = []
        for row, worth in zip(
            random_tokens(module, rows, PROMPT_TOKENS + samples * new), rewards, strict=True
        ):
            prompt, *texts = np.split(row, range(PROMPT_TOKENS, len(row), new))
            candidates = [
                Candidate("", tokens=text, finished="eos", log_probs=np.zeros(new), total=total)
                for text, total in zip(texts, worth, strict=True)
            ]
            sampled.append(Sampled(Group("", "", "", "", candidates), prompt))
        sizes = row_sizes_of(PROMPT_TOKENS, samples, new)[-1:]
        return pack_sampled(sampled, settings, 0, sizes)

    def _log_probs(self, rows: int, adapter: Any | None) -> Planned:
        """Log-probabilities of so many rows under the base, or with an adapter."""
        model, trainer = self._model, self._trainer
        base, mesh = model.generator_params, model.dpo_mesh
        # A part of an update may be larger than a micro-batch is.
        numbers = {
            name: np.resize(array, (rows, *array.shape[1:]))
            for name, array in self._micro_batch.items()
        }
        batch = with_shardings(numbers, batch_sharding(mesh))
        variables = {"params": base} if adapter is None else {"params": base, "lora": adapter}
        return Planned(
            program=trainer.reference if adapter is None else trainer.log_probs,
            arguments=(variables, batch),
            parameters=variables,
            moved=bytes_on_device(variables) * mesh.shape["fsdp"],
            change=self._change,
            values=lambda variables, _: (variables, numbers),
            **self._generator.of_batch(batch, mesh),
        )

    def _reference(self) -> Planned:
        settings, mesh = self._settings, self._model.dpo_mesh
        rows = micro_rows(settings, self._section, mesh)
        if not settings.kl_weight:
            rows = kl_rows(settings.groups // settings.minibatches, mesh)
        return self._log_probs(rows, None).beside(self._state_bytes())

    def _old(self) -> Planned:
        state = self._state()
        rows = micro_rows(self._settings, self._section, self._model.dpo_mesh)
        planned = self._log_probs(rows, state.params)
        # The adapter is the state's own.
        return planned.beside(bytes_on_device(state) - bytes_on_device(state.params))

    def _step(self) -> Planned:
        """An update's part: a micro-batch of prompts, each with all of its texts."""
        settings, model = self._settings, self._model
        base, mesh, state = model.generator_params, model.dpo_mesh, self._state()
        numbers = dict(self._micro_batch)
        lacking = ["reference"] * (settings.kl_weight > 0) + ["old"] * (settings.updates > 1)
        numbers |= {name: np.zeros_like(numbers["sampled"]) for name in lacking}
        batch = with_shardings(numbers, batch_sharding(mesh))
        passes = FROZEN + (self._generator.module.remat == "full")
        return Planned(
            program=self._trainer.setup.step,
            arguments=(state, base, batch, jax.ShapeDtypeStruct((), jnp.float32)),
            parameters=(base, state.params),
            passes=passes,
            needed=FROZEN,
            moved=passes * bytes_on_device(base) * mesh.shape["fsdp"],
            change=f"generator.remat=full, {self._change}",
            values=lambda state, base, _, rate: (untrained(state), base, numbers, rate),
            **self._generator.of_batch(batch, mesh),
        )
