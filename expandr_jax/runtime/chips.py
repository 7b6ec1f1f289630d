"""Peak rates of each kind of chip, each with its source.

Google's pages give peak compute (bf16), HBM bandwidth and the interconnect's bandwidth of a chip in
both directions together, in bits; what a program may use of the HBM is what libtpu's compiler
offers, as it says in the message of a program that does not fit.
"""

import dataclasses
import timeit
from collections.abc import Callable

import jax
import jax.numpy as jnp
import psutil

from expandr_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    Attributes:
        name: Its kind.
        capacity: Bytes of memory that a program may use.
        flops: Peak floating-point operations a second, in bfloat16 (CPU: float32).
        bandwidth: Bytes a second to and from that memory.
        network: Bytes a second to and from the other devices.
        source: Where these numbers are from.
    """

    name: str
    capacity: int
    flops: float
    bandwidth: float
    network: float
    source: str


_TPU = "https://cloud.google.com/tpu/docs/"
TPUS = {
    "v5e": Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, _TPU + "v5e"),
    "v5p": Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, _TPU + "v5p"),
    "v6e": Chip("v6e", int(31.25 * GIB), 918e12, 1600e9, 400e9, _TPU + "v6e"),
}
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"  # h100/, h200/ and a100/.
_GPUS = {  # Dense bf16, SXM boards, NVLink; how much memory they have, they say themselves.
    "H100": (989e12, 3350e9, 450e9, _NVIDIA),
    "H200": (989e12, 4800e9, 450e9, _NVIDIA),
    "A100": (312e12, 2039e9, 300e9, _NVIDIA),
}

# What `device_kind` begins with, of TPUs; the longer names first.
_TPU_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e"}


def known_chip(kind: str, gpu_capacity: int = 0) -> Chip | None:
    """The chip that jax calls so; None if it is not known.

    Args:
        kind: A device's `device_kind`.
        gpu_capacity: Bytes of its memory that a program may use, if it is a GPU.
    """
    for begins, name in _TPU_KINDS.items():
        if kind.startswith(begins):
            return TPUS[name]
    peaks = next((peaks for name, peaks in _GPUS.items() if name in kind), None)
    return peaks and Chip(kind, gpu_capacity, *peaks)


def accelerator(device: jax.Device) -> Chip:
    """The chip of a GPU or TPU that is here.

    Raises:
        UserError: It is of a kind that is not known.
    """
    kind = device.device_kind
    chip = known_chip(kind, (device.memory_stats() or {}).get("bytes_limit", 0))
    if chip is None:
        raise UserError(
            f"no peaks are known for {kind!r}; known are {', '.join((*TPUS, *_GPUS))} "
            "(expandr_jax/runtime/chips.py)"
        )
    return chip


def cpu(devices: int) -> Chip:
    """One of `devices` virtual devices that share this machine, measured: takes a second.

    A product of two matrices gives the operations, a copy the bandwidth; the other devices are
    reached through the same memory.
    """
    size = 1536
    x = jnp.ones((size, size), jnp.float32)
    y = jnp.ones(2**25, jnp.float32)
    flops = 2 * size**3 / best_seconds(jax.jit(jnp.dot), x, x)
    bandwidth = 2 * y.nbytes / best_seconds(jax.jit(lambda y: y + 1), y)
    memory = psutil.virtual_memory().total
    return Chip(
        "cpu", memory // devices, flops / devices, bandwidth / devices, bandwidth / devices,
        "measured here",
    )  # fmt: skip


def best_seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    """Seconds of the quickest of a few calls, after one that compiles."""

    def call() -> None:
        jax.block_until_ready(function(*arguments))

    call()
    return min(timeit.repeat(call, number=1, repeat=5))
