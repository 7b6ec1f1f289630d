"""Compiles a program for a topology and says what it needs."""

import contextlib
import dataclasses
import re
import time

import jax

from expandr_jax.planning.collectives import Collectives, count_collectives
from expandr_jax.runtime.chips import Chip

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)"


@dataclasses.dataclass(frozen=True)
class Needs:
    """The memory that a compiled program takes on each device.

    Attributes:
        argument: Bytes of arguments; of results too, where they do not take an argument's place.
        temporary: Bytes beside them while it runs.
        code: Bytes of the program itself.
        resident: Bytes of what else is held meanwhile.
        capacity: Bytes that there are.
        collectives: Collectives by kind; None where the compiler gave up, or cannot print what it
            made.
        seconds: That compiling took.
        compiled: To be called; None where the compiler gave up.
    """

    argument: int
    temporary: int
    code: int
    resident: int
    capacity: int
    collectives: dict[str, Collectives] | None
    seconds: float
    compiled: jax.stages.Compiled | None

    @property
    def total(self) -> int:
        return self.argument + self.temporary + self.code + self.resident

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def compile_program(lowered: jax.stages.Lowered, chip: Chip, resident: int = 0) -> Needs:
    """Compiles a traced program; one that the compiler rejects for memory needs too much.

    `resident` bytes are taken on each device already.
    """
    start = time.monotonic()
    compiled, collectives = None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = _rejected(str(error), chip)
    seconds = time.monotonic() - start
    if compiled is not None:
        found = compiled.memory_analysis()
        results = found.output_size_in_bytes - found.alias_size_in_bytes
        sizes = (
            found.argument_size_in_bytes + results,
            found.temp_size_in_bytes,
            found.generated_code_size_in_bytes,
        )
        # Some libtpu compile programs that they cannot print.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            collectives = count_collectives(compiled.as_text())
    return Needs(*sizes, resident, chip.capacity, collectives, seconds, compiled)


def _rejected(message: str, chip: Chip) -> tuple[int, int, int]:
    """Sizes from the message of a program that does not fit: arguments, all else and 0."""

    def size(pattern: str) -> int:
        found = re.search(pattern.replace("SIZE", _SIZE), message)
        return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0

    used = max(size(r"Used SIZE of "), size(r"\(SIZE\) exceeds available"))
    argument = size(r"arguments\s+SIZE")
    # Were neither found, it would still not fit.
    return argument, max(used, argument, chip.capacity + 1) - argument, 0


def roofline(
    chip: Chip, devices: int, flops: float, moved: float, collectives: dict[str, Collectives] | None
) -> tuple[float, str]:
    """The least time that a program can take: compute, memory and network at their peaks at once.

    Args:
        chip, devices: What each device can do, and how many there are.
        flops: Operations of all devices, what is recomputed included.
        moved: Bytes between a device and its memory.
        collectives: Those of the program; None leaves the network out. An all-reduce passes a
            device's links twice.

    Returns:
        Seconds of the slowest of the three, and which it is: "compute", "memory" or "network".
    """
    known = (collectives or {}).items()
    sent = sum(c.bytes * (2 if kind == "all-reduce" else 1) for kind, c in known)
    seconds = {
        "compute": flops / devices / chip.flops,
        "memory": moved / chip.bandwidth,
        "network": sent / chip.network,
    }
    bound = max(seconds, key=seconds.__getitem__)
    return seconds[bound], bound
