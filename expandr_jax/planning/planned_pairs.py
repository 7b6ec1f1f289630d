"""The programs of a step B that learns from files, as shapes: DPO's, its kin's and its reference's.

A pair stands for whatever the examples are; candidates that are learned by their rewards have one
response each.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.objectives.adapter import AdapterBatches, adapter_setup
from expandr_jax.objectives.packing import Example, pack, row_sizes
from expandr_jax.pair import GeneratorModel
from expandr_jax.planning.planned import (
    PAPER,
    REFERENCE,
    UPDATES,
    Calls,
    Planned,
    check_rows,
    random_tokens,
    untrained,
)
from expandr_jax.planning.planned_generator import GeneratorShapes
from expandr_jax.planning.planned_moves import restored
from expandr_jax.planning.topology import Topology
from expandr_jax.rewards.search import queries_at_once
from expandr_jax.sharding import batch_sharding, bytes_on_device, with_shardings
from expandr_jax.training.flops import FROZEN
from expandr_jax.training.setup import TrainingSetup, section_optimizer

PAIR_STEP, DEV_LOSSES = "DPO step", "DPO dev losses"


class PairShapes:
    """Makes the programs of a step B by files, with the config's generator, for a topology.

    Attributes:
        update: The program that stands for it.
    """

    update = PAIR_STEP

    def __init__(self, config: Config, topology: Topology, generator: GeneratorShapes):
        self._topology, self._generator = topology, generator
        self._settings, self._objective = config.learned, config.objective
        section = config.step_b_kind.section
        self._change = (
            f"a smaller {section}.batch_size or {section}.chunk, or more fsdp in mesh.dpo"
        )
        self._candidates = len(config.candidates.all_temperatures)

    @property
    def rewarded_rows(self) -> int:
        """Candidates that are rewarded together."""
        return queries_at_once(self._candidates) * self._candidates

    def held(self) -> int:
        """Bytes a device that stay for it, beside both models, while texts are rewarded."""
        return 0

    def sampling(self) -> dict[str, Callable[[], Planned]]:
        """What samples its texts otherwise than the generator's own programs do, by name."""
        return {}

    def learning(self) -> dict[str, Callable[[], Planned]]:
        """The programs that train, by name; the base is an argument of each."""
        dev = {DEV_LOSSES: self._losses} if self._settings.dev_share else {}
        return {REFERENCE: self._reference, PAIR_STEP: self._step, **dev}

    @staticmethod
    def paper_calls(calls: Calls, config: Config) -> list[tuple[str, str, int]]:
        """(part, program, calls) of its programs in the paper's run."""
        phase = config.step_b_kind.phase
        texts = calls("decode", PAPER["queries"] * PAPER["candidates"])
        pairs = calls(PAIR_STEP, PAPER["pairs"])
        return [
            ("candidates", "decode", texts * PAPER["tokens"]),
            (phase, REFERENCE, pairs),
            (phase, PAIR_STEP, PAPER["dpo_epochs"] * pairs),
        ]

    def restore(self) -> Planned:
        """The check of the trained state when it is read from a checkpoint."""
        model = self._generator.model()
        state = self._setup(model).shapes(self._generator.adapter)
        return restored(state, model.dpo_mesh, self._topology, self._generator.module)

    def _setup(self, model: GeneratorModel) -> TrainingSetup:
        optimizer = section_optimizer(self._settings, UPDATES)
        return adapter_setup(model, self._objective, self._settings, optimizer)

    @functools.cached_property
    def _batch(self) -> dict[str, np.ndarray]:
        """A batch of random tokens, as long as prompts and responses may be."""
        responses, config = self._objective.responses, self._settings
        prompt_length, new = config.prompt_length, config.response_length
        extras = dict.fromkeys(self._objective.extras, 1.0)
        examples, module = [], self._generator.module
        for row in random_tokens(module, config.batch_size, prompt_length + responses * new):
            prompt, *parts = np.split(row, range(prompt_length, len(row), new))
            examples.append(Example(prompt, parts, extras))
        return pack(examples, 0, row_sizes([examples[0].size], 1))

    def _pairs(self) -> tuple[GeneratorModel, dict[str, Any], dict[str, Any]]:
        """The model and a batch on its mesh, and what both programs say of themselves."""
        model = self._generator.model()
        check_rows(self._settings.batch_size, model.dpo_mesh, "dpo", "pairs")
        batch = with_shardings(self._batch, batch_sharding(model.dpo_mesh))
        return model, batch, self._generator.of_batch(batch, model.dpo_mesh)

    def _reference(self) -> Planned:
        """Log-probabilities of a batch under the base."""
        model, batch, common = self._pairs()
        base, rows = model.generator_params, self._settings.batch_size
        return Planned(
            program=AdapterBatches(model, self._objective, self._settings, rows).log_probs,
            arguments=({"params": base}, batch),
            parameters=base,
            moved=bytes_on_device(base) * model.dpo_mesh.shape["fsdp"],
            change=self._change,
            values=lambda variables, batch: (variables, batch | self._batch),
            **common,
        )

    def _compared(self, batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
        """A batch with what the reference thinks of it, where that is needed."""
        if not self._objective.reference:
            return batch
        shape = self._settings.batch_size, self._objective.responses
        sums = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
        return {**batch, "reference": sums}

    def _losses(self) -> Planned:
        """The losses of a batch that is held out, beside what is trained."""
        model, batch, common = self._pairs()
        base, mesh, rows = model.generator_params, model.dpo_mesh, self._settings.batch_size
        state = self._setup(model).shapes(self._generator.adapter)
        planned = Planned(
            program=AdapterBatches(model, self._objective, self._settings, rows).losses,
            arguments=(state.params, base, self._compared(batch, mesh)),
            parameters=(base, state.params),
            moved=bytes_on_device(base) * mesh.shape["fsdp"],
            change=self._change,
            values=lambda adapter, base, batch: (adapter, base, batch | self._batch),
            **common,
        )
        return planned.beside(bytes_on_device(state) - bytes_on_device(state.params))

    def _step(self) -> Planned:
        """A step of B: a batch of prompts and their responses."""
        model, batch, common = self._pairs()
        base, mesh, setup = model.generator_params, model.dpo_mesh, self._setup(model)
        state = setup.shapes(self._generator.adapter)
        batch = self._compared(batch, mesh)
        passes = FROZEN + (self._generator.module.remat == "full")
        return Planned(
            program=setup.step,
            arguments=(state, base, batch, jax.eval_shape(jax.random.key, 0)),
            parameters=(base, state.params),
            passes=passes,
            needed=FROZEN,
            moved=passes * bytes_on_device(base) * mesh.shape["fsdp"],
            change=f"generator.remat=full, {self._change}",
            values=lambda state, base, batch, key: (
                untrained(state),
                base,
                batch | self._batch,
                key,
            ),
            **common,
        )
