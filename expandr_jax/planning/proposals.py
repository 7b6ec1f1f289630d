"""Proposes mesh, micro-batch and recomputation for each phase of a run: `train.plan --search`.

Settings are ordered by an estimate from shapes; the compiler then says of one after another
whether it fits, and the first that does is proposed.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console

from expandr_jax.config import Config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.models.stack import REMATS
from expandr_jax.pair import OF_ONE_PROCESS
from expandr_jax.planning.collectives import Collectives
from expandr_jax.planning.compiled import compile_program, roofline
from expandr_jax.planning.planned import Planned
from expandr_jax.planning.programs import planned_programs, step_b_shapes
from expandr_jax.planning.topology import Topology
from expandr_jax.sharding import bytes_on_device

SETTINGS_TRIED = 4  # Settings of a phase that are compiled at most.
# Phase, the program that stands for it (None: as step B has it), where its recomputation is set.
SEARCHED = {
    "contrastive": ("contrastive step", "contrastive.remat"),
    "encoding": ("corpus encoding", None),
    "sampling": ("decode", None),
    "dpo": (None, "generator.remat"),
}


def config_flags(settings: Mapping[str, Any]) -> str:
    """Settings by their names in the config, as they are given on the command line."""
    return " ".join(
        f'--config.{name}="{value}"' if isinstance(value, tuple) else f"--config.{name}={value}"
        for name, value in settings.items()
    )


def propose(config: Config, topology: Topology, console: Console) -> list[dict[str, Any]]:
    """The quickest settings of each phase, by estimate, that the compiler says fit.

    All that is not searched stays as the config says.

    Returns:
        {"phase", "settings", "bytes_total", "roofline_seconds"}, as --out has it, for each phase
        that has such settings; of the others nothing tried fits.
    """
    found = []
    for phase in phases_of(config, topology):
        console.print(f"{phase}: estimating settings")
        ordered = sorted(_estimates(config, topology, phase), key=lambda item: item[0])
        for number, (order, settings, planned) in enumerate(ordered[:SETTINGS_TRIED], start=1):
            console.print(
                f"{phase}: compiling {config_flags(settings)} ({number} of at most "
                f"{SETTINGS_TRIED})",
                soft_wrap=True,
                markup=False,
            )
            lowered = planned.program.lower(*planned.arguments)
            needs = compile_program(lowered, topology.chip, planned.resident)
            needs = dataclasses.replace(needs, compiled=None)  # Not kept: it may be large.
            if needs.fits:
                row = {"phase": phase, "settings": settings, "bytes_total": needs.total}
                found.append(row | {"roofline_seconds": order[0]})
                break
    return found


def phases_of(config: Config, topology: Topology) -> list[str]:
    """The phases that the config's run has."""
    programs = planned_programs(config, topology)
    return [phase for phase in SEARCHED if _program(config, phase) in programs]


def _program(config: Config, phase: str) -> str:
    """The program that stands for a phase."""
    return SEARCHED[phase][0] or step_b_shapes(config).update


def _estimates(
    config: Config, topology: Topology, phase: str
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Planned]]:
    """(what to sort by, its time first; settings; the program with them) of all that may fit."""
    program, (_, remat_name) = _program(config, phase), SEARCHED[phase]
    micro_batches = [0]
    if phase == "contrastive":
        queries = config.contrastive.batch_size
        micro_batches += [queries // 2**i for i in range(3) if queries % 2**i == 0]
    remats = REMATS if remat_name else (None,)
    devices = topology.host_devices if phase in OF_ONE_PROCESS else topology.devices
    for mesh, micro, remat in itertools.product(_meshes(len(devices)), micro_batches, remats):
        settings: dict[str, Any] = {f"mesh.{phase}": mesh}
        if phase == "contrastive":
            settings["contrastive.micro_batch"] = micro
        if remat:
            settings[remat_name] = remat
        if micro % (mesh[0] * mesh[1]):
            continue
        try:
            planned = planned_programs(with_settings(config, settings), topology)[program]()
        except UserError:
            continue  # Rows that cannot be split so.
        held = bytes_on_device(planned.arguments) + planned.resident
        if held + _kept(planned, mesh, remat) > topology.chip.capacity:
            continue
        estimate, _ = roofline(
            topology.chip, planned.devices, planned.run_flops, planned.moved, _sent(planned, mesh)
        )
        order = (estimate, mesh[2], -mesh[1], REMATS.index(remat) if remat else 0, -micro)
        yield order, settings, planned


def _meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    """(data, fsdp, tensor): weights spread over all devices, or whole in each part of them."""
    for tensor in (size for size in (1, 2, 4, 8) if devices % size == 0):
        yield 1, devices // tensor, tensor
        if devices > tensor:
            yield devices // tensor, 1, tensor


def _kept(planned: Planned, mesh: tuple[int, int, int], remat: str | None) -> int:
    """Bytes that a device keeps for the backward pass, at the very least."""
    if remat is None:
        return 0
    config, size = planned.module.config, planned.module.dtype.itemsize
    data, fsdp, tensor = mesh
    tokens = planned.tokens // planned.turns // (data * fsdp)
    width = config.hidden_size
    if remat != "full":
        # Queries, keys, values and the feed-forward's sides.
        width += (3 * config.hidden_size + 2 * config.mlp_dim) // tensor
    return config.num_layers * tokens * width * size


def _sent(planned: Planned, mesh: tuple[int, int, int]) -> dict[str, Collectives]:
    """What a program sends, from shapes: weights gathered for each pass, and tensor's sums."""
    data, fsdp, tensor = mesh
    config, size = planned.module.config, planned.module.dtype.itemsize
    whole = bytes_on_device(planned.parameters) * fsdp
    gathered = planned.passes * planned.turns * whole if fsdp > 1 else 0
    if planned.learns and data * fsdp > 1:
        gathered += 2 * whole  # The gradients' sum, about.
    tokens = planned.tokens // (data * fsdp)
    summed = 2 * config.num_layers * planned.passes * tokens * config.hidden_size * size
    return {
        "all-gather": Collectives(1, gathered, gathered),
        "all-reduce": Collectives(1, summed * (tensor > 1), summed),
    }
