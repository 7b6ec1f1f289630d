"""Compiles a program for a topology and says what it needs."""

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from expandr_jax.planning.chips import Chip
from expandr_jax.planning.collectives import Collectives, count_collectives

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled program takes of each device.

    Attributes:
        argument: Bytes of arguments; of results too, where they do not take an argument's place.
        temporary: Bytes beside them while it runs.
        resident: Bytes of what else is held meanwhile.
        total: Bytes of all three and of the program itself.
        capacity: Bytes that there are.
        collectives: Collectives by kind; empty where the compiler gave up.
        seconds: That compiling took.
        compiled: To be called; None where the compiler gave up.
    """

    argument: int
    temporary: int
    resident: int
    total: int
    capacity: int
    collectives: dict[str, Collectives]
    seconds: float
    compiled: jax.stages.Compiled | None

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def lower(program: Any, arguments: Sequence[Any]) -> jax.stages.Lowered:
    """Traces a jitted program; arguments are arrays or ShapeDtypeStructs with shardings."""
    return program.lower(*arguments)


def compile_program(lowered: jax.stages.Lowered, chip: Chip, resident: int = 0) -> Needs:
    """Compiles a traced program; one that the compiler rejects for memory needs too much.

    Args:
        lowered: From `lower`.
        chip: What it is to fit.
        resident: Bytes that are taken on each device already.
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _rejected(str(error), chip, resident, time.monotonic() - start)
    seconds = time.monotonic() - start
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    argument = sizes.argument_size_in_bytes + results
    temporary = sizes.temp_size_in_bytes
    return Needs(
        argument=argument,
        temporary=temporary,
        resident=resident,
        total=argument + temporary + resident + sizes.generated_code_size_in_bytes,
        capacity=chip.capacity,
        collectives=count_collectives(compiled.as_text()),
        seconds=seconds,
        compiled=compiled,
    )


def _rejected(message: str, chip: Chip, resident: int, seconds: float) -> Needs:
    """Sizes from the message of a program that does not fit."""

    def size(pattern: str) -> int:
        found = re.search(pattern.replace("SIZE", _SIZE), message)
        return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0

    used = max(size(r"Used SIZE of "), size(r"\(SIZE\) exceeds available"))
    argument = size(r"arguments\s+SIZE")
    # Were neither found, it would still not fit.
    total = max(used, argument, chip.capacity + 1)
    return Needs(
        argument=argument,
        temporary=total - argument,
        resident=resident,
        total=total + resident,
        capacity=chip.capacity,
        collectives={},
        seconds=seconds,
        compiled=None,
    )


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least time that a program can take.

    Attributes:
        seconds: That of the slowest of the three below.
        bound: "compute", "memory" or "network".
    """

    seconds: float
    bound: str


def roofline(
    chip: Chip, devices: int, flops: float, moved: float, collectives: dict[str, Collectives]
) -> Roofline:
    """Each of compute, memory and network at its peak, all at once: nothing can be quicker.

    Args:
        chip: What a device can do.
        devices: How many there are.
        flops: Operations of all devices, what is recomputed included.
        moved: Bytes between a device and its memory.
        collectives: Those of the program. An all-reduce passes a device's links twice.
    """
    sent = sum(c.bytes * (2 if kind == "all-reduce" else 1) for kind, c in collectives.items())
    times = {
        "compute": flops / devices / chip.flops,
        "memory": moved / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(times, key=times.__getitem__)
    return Roofline(times[bound], bound)
