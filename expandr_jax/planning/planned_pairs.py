"""The programs of a step B that learns from files, as shapes: DPO's, its kin's and its reference's.

A pair stands for whatever the examples are; candidates that are learned by their rewards have one
response each.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from expandr_jax.config import Config
from expandr_jax.objectives.adapter import AdapterBatches, adapter_setup
from expandr_jax.objectives.packing import Example, pack, row_sizes
from expandr_jax.pair import GeneratorModel
from expandr_jax.planning.flops import FROZEN
from expandr_jax.planning.planned import (
    NEW,
    PAIRS,
    PAPER,
    PROMPT,
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
from expandr_jax.training.setup import TrainingSetup, section_optimizer

PAIR_STEP = "DPO step"


class PairShapes:
    """Makes the programs of a step B by files, with the config's generator, for a topology.

    Attributes:
        update: The program that stands for it.
    """

    update = PAIR_STEP

    def __init__(self, config: Config, topology: Topology, generator: GeneratorShapes):
        self._topology, self._generator = topology, generator
        self._settings, self._objective = config.learned, config.objective
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
        return {REFERENCE: self._reference, PAIR_STEP: self._step}

    @staticmethod
    def paper_calls(calls: Calls, config: Config) -> list[tuple[str, str, int]]:
        """(part, program, calls) of its programs in the paper's run."""
        phase, pairs = config.step_b_kind.phase, math.ceil(PAPER["pairs"] / PAIRS)
        return [
            ("candidates", "decode", calls("decode", PAPER["queries"] * PAPER["candidates"]) * NEW),
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
        """PAIRS examples of random tokens."""
        responses = self._objective.responses
        extras = dict.fromkeys(self._objective.extras, 1.0)
        examples = []
        for row in random_tokens(self._generator.module, PAIRS, PROMPT + responses * NEW):
            prompt, *parts = np.split(row, range(PROMPT, len(row), NEW))
            examples.append(Example(prompt, parts, extras))
        return pack(examples, 0, row_sizes([examples[0].size], 1))

    def _pairs(self) -> tuple[GeneratorModel, dict[str, Any], dict[str, Any]]:
        """The model and a batch on its mesh, and what both programs say of themselves."""
        model = self._generator.model()
        check_rows(PAIRS, model.dpo_mesh, "dpo", "pairs")
        batch = with_shardings(self._batch, batch_sharding(model.dpo_mesh))
        return model, batch, self._generator.of_batch(batch, model.dpo_mesh)

    def _reference(self) -> Planned:
        """Log-probabilities of PAIRS under the base."""
        model, batch, common = self._pairs()
        base = model.generator_params
        return Planned(
            program=AdapterBatches(model, self._objective, self._settings, PAIRS).log_probs,
            arguments=({"params": base}, batch),
            parameters=base,
            moved=bytes_on_device(base) * model.dpo_mesh.shape["fsdp"],
            change="a smaller dpo.batch_size or dpo.chunk, or more fsdp in mesh.dpo",
            values=lambda variables, batch: (variables, batch | self._batch),
            **common,
        )

    def _step(self) -> Planned:
        """A step of B: PAIRS, each a prompt of PROMPT tokens and its responses of NEW."""
        model, batch, common = self._pairs()
        base, mesh, setup = model.generator_params, model.dpo_mesh, self._setup(model)
        state = setup.shapes(self._generator.adapter)
        if self._objective.reference:
            batch["reference"] = jax.ShapeDtypeStruct(
                (PAIRS, self._objective.responses), jnp.float32, sharding=batch_sharding(mesh)
            )
        passes = FROZEN + (self._generator.module.remat == "full")
        return Planned(
            program=setup.step,
            arguments=(state, base, batch, jax.eval_shape(jax.random.key, 0)),
            parameters=(base, state.params),
            passes=passes,
            needed=FROZEN,
            moved=passes * bytes_on_device(base) * mesh.shape["fsdp"],
            change="generator.remat=full, a smaller dpo.batch_size or dpo.chunk, or more fsdp in "
            "mesh.dpo",
            values=lambda state, base, batch, key: (
                untrained(state),
                base,
                batch | self._batch,
                key,
            ),
            **common,
        )
