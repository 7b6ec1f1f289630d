"""The generator's programs, as shapes: sampling, reference log-probabilities and DPO."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.generation.programs import (
    EngineShape,
    Programs,
    heads_axis,
    make_programs,
    prefill_rows,
    unstack_shardings,
    variable_shardings,
)
from expandr_jax.generation.slots import Slots, empty_settings
from expandr_jax.loading import base_type, penalizes
from expandr_jax.models.decoder import unstack_layers
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.adapter import adapter_setup, reference_program
from expandr_jax.objectives.packing import Example, pack, row_sizes
from expandr_jax.objectives.registry import OBJECTIVES
from expandr_jax.planning.flops import FROZEN, forward_flops
from expandr_jax.planning.planned import (
    NEW,
    PAIRS,
    PROMPT,
    ROWS,
    Planned,
    bytes_on_device,
    check_rows,
    key_shape,
    param_shapes,
    placed,
    planned_mesh,
    random_tokens,
    shape_module,
    untrained,
)
from expandr_jax.planning.topology import Topology
from expandr_jax.sharding import adapter_shardings, batch_sharding, replicated
from expandr_jax.training.train_state import OptimizerConfig
from expandr_jax.weights.families import family_of
from expandr_jax.weights.trees import model_shardings

TIMED = 32  # Tokens that decode makes for each slot in one timed call.


class GeneratorShapes:
    """Makes the programs of the config's generator.

    Args:
        config: The whole config.
        topology: What to compile for.
    """

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology = config, topology
        self._objective = OBJECTIVES[config.dpo.loss]
        section = config.generator
        module = shape_module(section, "generator", section.compute_dtype)
        if not family_of(module).generates:
            raise UserError("generator: its shape is that of an encoder, which generates no text")
        weights = base_type(section)
        if weights == "int8":
            module = module.clone(config=dataclasses.replace(module.config, int8=True))
            weights = section.compute_dtype  # Of what is not in int8.
        self.module = module.clone(lora=config.lora, remat=section.remat)
        self.params = param_shapes(self.module, jnp.dtype(weights))
        self.adapter = jax.eval_shape(
            lambda params: init_lora(jax.random.key(0), params, self.module.lora), self.params
        )

    @property
    def _rows(self) -> int:
        """Slots of a process."""
        return max(1, ROWS // self._topology.hosts)

    def resident(self) -> int:
        """Bytes a device of what a run holds: the base, as DPO has it."""
        mesh = planned_mesh(self._config, "dpo", self._topology)
        return bytes_on_device(placed(self.params, model_shardings(mesh, self.module, self.params)))

    def _sampling(self) -> tuple[Mesh, Programs, dict[str, Any]]:
        """The mesh, the engine's programs and its variables, the adapter among them."""
        mesh = planned_mesh(self._config, "sampling", self._topology)
        check_rows(self._rows, mesh, "sampling", "slots")
        module = self.module.clone(unroll=True, remat="none")
        on_cpu = self._topology.devices[0].platform == "cpu"
        programs = make_programs(
            EngineShape(
                module=module,
                slots=self._rows,
                length=PROMPT + NEW,
                max_new_tokens=NEW,
                cache_dtype=jnp.dtype(jnp.float32 if on_cpu else module.dtype),
                penalize=penalizes(self._config),
                log_probs=False,
                seed=self._config.seed,
                eos_ids=(0,),
                mesh=mesh,
                heads_axis=heads_axis(module, mesh),
            )
        )
        places = variable_shardings(mesh, module, self.params, self.adapter)
        layers = module.config.num_layers
        variables = {
            name: placed(
                jax.eval_shape(unstack_layers, tree), unstack_shardings(places[name], layers)
            )
            for name, tree in (("params", self.params), ("lora", self.adapter))
        }
        return mesh, programs, variables

    def prefill(self) -> Planned:
        """Prompts of PROMPT tokens, as many as the engine runs together."""
        mesh, programs, variables = self._sampling()
        rows = prefill_rows(self._rows, PROMPT, mesh)
        place = batch_sharding(mesh)
        tokens = jax.ShapeDtypeStruct((rows, PROMPT), jnp.int32, sharding=place)
        length = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=place)
        forward = forward_flops(self.module, self.params, rows, PROMPT)
        return Planned(
            name="prefill",
            program=programs.prefill,
            arguments=(variables, tokens, length, None),
            mesh=mesh,
            parameters=variables,
            module=self.module,
            rows=rows,
            tokens=rows * PROMPT,
            tokens_at_once=rows * PROMPT,
            model_flops=forward,
            run_flops=forward,
            moved=bytes_on_device(variables) * mesh.shape["fsdp"],
            change="a larger tensor axis in mesh.sampling",
            shares=self._topology.hosts,
            values=lambda variables, _, __, prefix: (
                variables,
                random_tokens(self.module, rows, PROMPT),
                np.full(rows, PROMPT, np.int32),
                prefix,
            ),
        )

    def decode(self) -> Planned:
        """One token for each of a process's slots, each with room for PROMPT + NEW."""
        rows = self._rows
        mesh, programs, variables = self._sampling()
        slots = placed(jax.eval_shape(programs.empty, None), programs.placed)
        everywhere = replicated(mesh)
        cancelled = jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=everywhere)
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        forward = forward_flops(self.module, self.params, rows, 1, keys=PROMPT + NEW, logits=rows)
        weights = bytes_on_device(variables) * mesh.shape["fsdp"]

        def all_active(variables: Any, slots: Slots, *_: Any) -> Sequence[Any]:
            whole = np.zeros(rows, np.int32)
            stream = np.arange(rows, dtype=np.uint32)
            begun = slots.replace(
                settings=empty_settings(rows).replace(limit=whole + NEW, stream=stream),
                cache=slots.cache.replace(length=whole + PROMPT),
                token=random_tokens(self.module, rows),
                active=np.ones(rows, bool),
                count=whole,
            )
            # Copies: the slots are donated, and no buffer can be given away twice.
            begun = begun.replace(settings=jax.tree.map(np.array, begun.settings))
            return variables, begun, np.zeros(rows, bool), np.int32(TIMED), np.int32(0)

        return Planned(
            name="decode",
            program=programs.decode,
            arguments=(variables, slots, cancelled, number, number),
            mesh=mesh,
            parameters=variables,
            module=self.module,
            rows=rows,
            tokens=rows,
            tokens_at_once=rows,
            model_flops=forward,
            run_flops=forward,
            moved=weights + bytes_on_device(slots.cache),
            change="fewer generator.slots, or a larger tensor axis in mesh.sampling",
            shares=self._topology.hosts,
            values=all_active,
            units=TIMED,
        )

    def _batch(self) -> dict[str, np.ndarray]:
        """PAIRS examples of random tokens."""
        responses = self._objective.responses
        extras = dict.fromkeys(self._objective.extras, 1.0)
        examples = []
        for row in random_tokens(self.module, PAIRS, PROMPT + responses * NEW):
            prompt, *parts = np.split(row, range(PROMPT, len(row), NEW))
            examples.append(Example(prompt, parts, extras))
        return pack(examples, 0, row_sizes([examples[0].size], 1))

    def _pairs(self) -> tuple[Mesh, Any, dict[str, Any], int]:
        """The mesh, the placed base, a batch and the operations of one forward pass over it."""
        mesh = planned_mesh(self._config, "dpo", self._topology)
        check_rows(PAIRS, mesh, "dpo", "pairs")
        base = placed(self.params, model_shardings(mesh, self.module, self.params))
        batch = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
            for name, x in self._batch().items()
        }
        rows, length = batch["tokens"].shape
        logits = rows * batch["targets"].shape[1]
        forward = forward_flops(self.module, self.params, rows, length, logits=logits)
        return mesh, base, batch, forward

    def reference(self) -> Planned:
        """Log-probabilities of PAIRS under the base."""
        mesh, base, batch, forward = self._pairs()
        tokens = batch["tokens"].size
        return Planned(
            name="reference log-probabilities",
            program=reference_program(
                mesh,
                jax.tree.map(lambda leaf: leaf.sharding, base),
                module=self.module,
                responses=self._objective.responses,
                chunk=self._config.dpo.chunk,
            ),
            arguments=({"params": base}, batch),
            mesh=mesh,
            parameters=base,
            module=self.module,
            rows=PAIRS,
            tokens=tokens,
            tokens_at_once=tokens,
            model_flops=forward,
            run_flops=forward,
            moved=bytes_on_device(base) * mesh.shape["fsdp"],
            change="a smaller dpo.batch_size or dpo.chunk, or more fsdp in mesh.dpo",
            values=lambda variables, batch: (variables, batch | self._batch()),
        )

    def dpo(self) -> Planned:
        """A step of B: PAIRS, each a prompt of PROMPT tokens and its responses of NEW."""
        mesh, base, batch, forward = self._pairs()
        config = self._config.dpo
        shardings = jax.tree.map(lambda leaf: leaf.sharding, base)
        setup = adapter_setup(
            mesh,
            self.adapter,
            adapter_shardings(mesh, shardings, self.adapter),
            shardings,
            OptimizerConfig(1.0, 2, accumulation=config.accumulation),
            objective=self._objective,
            module=self.module,
            settings=config,
        )
        state = placed(jax.eval_shape(setup.create, self.adapter), setup.shardings)
        if self._objective.reference:
            batch["reference"] = jax.ShapeDtypeStruct(
                (PAIRS, self._objective.responses), jnp.float32, sharding=batch_sharding(mesh)
            )
        passes = FROZEN + (self.module.remat == "full")
        tokens = batch["tokens"].size
        return Planned(
            name="DPO step",
            program=setup.step,
            arguments=(state, base, batch, key_shape()),
            mesh=mesh,
            parameters=(base, state.params),
            module=self.module,
            rows=PAIRS,
            tokens=tokens,
            tokens_at_once=tokens,
            model_flops=FROZEN * forward,
            run_flops=passes * forward,
            passes=passes,
            moved=passes * bytes_on_device(base) * mesh.shape["fsdp"],
            change="generator.remat=full, a smaller dpo.batch_size or dpo.chunk, or more fsdp in "
            "mesh.dpo",
            values=lambda state, base, batch, key: (
                untrained(state),
                base,
                batch | self._batch(),
                key,
            ),
        )
