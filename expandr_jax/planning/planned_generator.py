"""The generator's programs, as shapes: sampling, and how its base moves."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.generation.programs import make_programs, unstack_shardings, variable_shardings
from expandr_jax.generation.sampler import slots_of_a_process
from expandr_jax.generation.slots import EngineShape, Slots, empty_settings
from expandr_jax.loading import base_type, penalizes
from expandr_jax.models.decoder import unstack_layers
from expandr_jax.models.generator import Generator
from expandr_jax.models.quantized import kept_in
from expandr_jax.pair import GeneratorModel, adapter_shapes
from expandr_jax.planning.planned import (
    Planned,
    check_rows,
    param_shapes,
    params_on,
    planned_mesh,
    random_tokens,
    shape_module,
)
from expandr_jax.planning.planned_moves import (
    merged,
    planned_gathering,
    spread_leaves,
    unstacked,
)
from expandr_jax.planning.topology import Topology
from expandr_jax.sharding import (
    batch_sharding,
    bytes_on_device,
    replicated,
    with_shardings,
)
from expandr_jax.training.flops import forward_flops
from expandr_jax.weights.families import family_of

TIMED = 32  # Tokens that decode makes for each slot in one timed call.
RANK_TOKENS = 6  # Tokens that a passage takes in an order of passages, as it is written.
LEAD_TOKENS = 10  # Tokens of everything else in such an answer.


class GeneratorShapes:
    """Makes the programs of the config's generator for a topology."""

    def __init__(self, config: Config, topology: Topology):
        self._config, self._topology = config, topology
        section = config.generator
        module = shape_module(section, "generator", section.compute_dtype)
        if not family_of(module).generates:
            raise UserError("generator: its shape is that of an encoder, which generates no text")
        module, weights = kept_in(module, base_type(section), "generator.weights")
        self.module = module.clone(lora=config.lora, remat=section.remat)
        self.params = param_shapes(self.module, weights)
        self.adapter = adapter_shapes(self.module, self.params)

    @property
    def _mesh(self) -> Mesh:
        """The devices that train."""
        return planned_mesh(self._config, "dpo", self._topology)

    @property
    def _held(self) -> Any:
        """The base as the devices that train hold it."""
        return params_on(self._mesh, self.module, self.params)

    def resident(self) -> int:
        """Bytes a device of what a run holds: the base, as DPO has it."""
        return bytes_on_device(self._held)

    @property
    def gathers(self) -> bool:
        """Whether processes fetch the base from each other: they each sample with all of it."""
        return self._topology.hosts > 1 and bool(spread_leaves(self._held))

    def gather(self) -> Planned:
        """A block of the base's largest parameter, on its way to every host."""
        return planned_gathering(self._held, self._mesh, self.module)

    def to_engine(self) -> Planned:
        """The base on its way to the devices that sample, where each layer is by itself."""
        shape, variables = self.engine()
        shardings = variable_shardings(shape.mesh, shape.module, self.params, self.adapter)
        stacked = with_shardings(self.params, shardings["params"])["layers"]
        return unstacked(stacked, variables, shape.mesh, self.module, self._topology.hosts)

    def merge(self) -> Planned:
        """The export's product of the largest update of the base."""
        return merged(self.adapter, self._topology, self.module)

    def engine(
        self,
        slots: int = 0,
        new: int = 0,
        log_probs: bool = False,
        prompt: int = 0,
        adapted: bool = True,
    ) -> tuple[EngineShape, dict[str, Any]]:
        """What the engine of a process is compiled for, and its variables.

        Args:
            slots: 0: the process's part of the config's.
            new: Tokens that a text may have; 0: as many as any that is not written on-policy.
            log_probs: Whether their log-probabilities are kept.
            prompt: Tokens that a prompt may have; 0: those that step B learns from.
            adapted: Whether there is an adapter.
        """
        mesh = planned_mesh(self._config, "sampling", self._topology)
        config, hosts = self._config, self._topology.hosts
        slots = slots or slots_of_a_process(config.generator, mesh, processes=hosts)
        sections = config.expansion, config.candidates, config.answer
        new = new or max(section.max_new_tokens for section in sections)
        prompt = prompt or config.dpo.prompt_length
        check_rows(slots, mesh, "sampling", "slots")
        module = self.module.clone(unroll=True, remat="none")
        shape = EngineShape(
            module=module,
            slots=slots,
            length=prompt + new,
            max_new_tokens=new,
            seed=config.seed,
            eos_ids=(0,),
            mesh=mesh,
            penalize=penalizes(config),
            log_probs=log_probs,
        )
        shardings = variable_shardings(mesh, module, self.params, self.adapter)
        variables = {
            name: with_shardings(
                jax.eval_shape(unstack_layers, tree),
                unstack_shardings(shardings[name], module.config.num_layers),
            )
            for name, tree in (("params", self.params), ("lora", self.adapter))
            if adapted or name == "params"
        }
        return shape, variables

    def _slots(self, shape: EngineShape) -> Slots:
        """All slots of an engine, as shapes."""
        programs = make_programs(shape)
        return with_shardings(jax.eval_shape(programs.empty, None), programs.shardings)

    def insert(self) -> Planned:
        """Prompts on their way into slots, as many as are prefilled together."""
        shape, variables = self.engine()
        programs, prefill, slots = make_programs(shape), self.prefill(), self._slots(shape)
        prompts = jax.eval_shape(programs.prefill, *prefill.arguments)
        prompts = with_shardings(prompts, programs.prompts)
        by_row = batch_sharding(shape.mesh)
        source = jax.ShapeDtypeStruct((shape.slots,), jnp.int32, sharding=by_row)
        settings = jax.eval_shape(functools.partial(empty_settings, shape.slots))
        return Planned(
            program=programs.insert,
            arguments=(slots, prompts, source, with_shardings(settings, by_row)),
            mesh=shape.mesh,
            parameters=(),
            module=self.module,
            rows=prefill.rows,
            tokens=0,
            forward_flops=0,
            moved=2 * bytes_on_device(prompts),
            change=prefill.change,
            shares=self._topology.hosts,
            resident=bytes_on_device(variables),
            values=lambda slots, prompts, *_: (
                slots,
                prompts,
                np.zeros(shape.slots, np.int32),
                jax.tree.map(np.array, empty_settings(shape.slots)),
            ),
        )

    def prefill(self, shares: int = 0, **engine: Any) -> Planned:
        """Prompts as long as they may be, as many as the engine runs together, beside its slots.

        Args:
            shares: Processes that run it; 0: all.
            engine: As of `engine`.
        """
        shape, variables = self.engine(**engine)
        length = shape.length - shape.max_new_tokens
        rows, mesh = shape.prefill_rows(length), shape.mesh
        by_row = batch_sharding(mesh)
        tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=by_row)
        lengths = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_row)
        return Planned(
            program=make_programs(shape).prefill,
            arguments=(variables, tokens, lengths, None),
            mesh=mesh,
            parameters=variables,
            module=self.module,
            rows=rows,
            tokens=rows * length,
            forward_flops=forward_flops(self.module, self.params, rows, length),
            moved=bytes_on_device(variables) * mesh.shape["fsdp"],
            change="a larger tensor axis in mesh.sampling",
            resident=bytes_on_device(self._slots(shape)),
            shares=shares or self._topology.hosts,
            values=lambda variables, _, __, prefix: (
                variables,
                random_tokens(self.module, rows, length),
                np.full(rows, length, np.int32),
                prefix,
            ),
        )

    def decode(
        self, *args: Any, fewer: str = "generator.slots", shares: int = 0, **engine: Any
    ) -> Planned:
        """One token for each of a process's slots, each with room for a prompt and a text.

        Args:
            args, engine: As of `engine`.
            fewer: What to have less of where it does not fit.
            shares: Processes that run it; 0: all.
        """
        shape, variables = self.engine(*args, **engine)
        rows, mesh, programs = shape.slots, shape.mesh, make_programs(shape)
        new = shape.max_new_tokens
        prompt = shape.length - new
        slots = self._slots(shape)
        everywhere = replicated(mesh)
        cancelled = jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=everywhere)
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
        weights = bytes_on_device(variables) * mesh.shape["fsdp"]
        timed = min(TIMED, new)

        def all_active(variables: Any, slots: Slots, *_: Any) -> Sequence[Any]:
            whole = np.zeros(rows, np.int32)
            stream = np.arange(rows, dtype=np.uint32)
            begun = slots.replace(
                settings=empty_settings(rows).replace(limit=whole + new, stream=stream),
                cache=slots.cache.replace(length=whole + prompt),
                token=random_tokens(self.module, rows),
                active=np.ones(rows, bool),
                count=whole,
            )
            # Copies: the slots are donated, and no buffer can be given away twice.
            begun = begun.replace(settings=jax.tree.map(np.array, begun.settings))
            return variables, begun, np.zeros(rows, bool), np.int32(timed), np.int32(0)

        return Planned(
            program=programs.decode,
            arguments=(variables, slots, cancelled, number, number),
            mesh=mesh,
            parameters=variables,
            module=self.module,
            rows=rows,
            tokens=rows,
            forward_flops=forward_flops(
                self.module, self.params, rows, 1, keys=shape.length, logits=rows
            ),
            moved=weights + bytes_on_device(slots.cache),
            change=f"fewer {fewer}, or a larger tensor axis in mesh.sampling",
            shares=shares or self._topology.hosts,
            values=all_active,
            units=timed,
        )

    def lists(self) -> dict[str, Callable[[], Planned]]:
        """The programs of rows that are ranked again by lists, by name.

        One process ranks, with the base alone, and has all slots. A prompt fills the largest
        bucket; an answer names each passage of a window.
        """
        new = RANK_TOKENS * self._config.evaluation.listwise.window + LEAD_TOKENS
        longest = max(self._config.generator.prompt_buckets)
        room = (self.module.config.max_positions or longest + new) - new
        slots = self._config.generator.slots
        engine = {"slots": slots, "new": new, "prompt": min(longest, room), "adapted": False}
        fewer = "generator.slots, a smaller generator.prompt_buckets"
        return {
            "listwise prefill": functools.partial(self.prefill, shares=1, **engine),
            "listwise decode": functools.partial(self.decode, shares=1, fewer=fewer, **engine),
        }

    def model(self) -> GeneratorModel:
        """The generator as training has it."""
        generator, mesh, base = Generator(self.module, None, (), 0, None), self._mesh, self._held
        return GeneratorModel(mesh, mesh, generator, base, base, "")

    def of_batch(self, batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
        """What a program of packed rows says of itself, as `Planned` has it."""
        rows, length = batch["tokens"].shape
        logits = rows * batch["targets"].shape[1]
        return {
            "mesh": mesh,
            "module": self.module,
            "rows": rows,
            "tokens": rows * length,
            "forward_flops": forward_flops(self.module, self.params, rows, length, logits=logits),
        }
