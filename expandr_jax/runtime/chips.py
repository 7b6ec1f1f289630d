"""What each kind of chip can do: the one place for its figures, each with its source.

Google's pages give peak compute (bf16), HBM bandwidth and the interconnect's bandwidth of a chip in
both directions together, in bits; what a program may use of the HBM is what libtpu's compiler
offers, as it says in the message of a program that does not fit.
"""

import dataclasses
import time

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
        source: Where the figures are from.
    """

    name: str
    capacity: int
    flops: float
    bandwidth: float
    network: float
    source: str

    @property
    def is_tpu(self) -> bool:
        return self.name in TPUS


_TPU = "https://cloud.google.com/tpu/docs/"
TPUS = {
    "v5e": Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, _TPU + "v5e"),
    "v5p": Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, _TPU + "v5p"),
    "v6e": Chip("v6e", int(31.25 * GIB), 918e12, 1600e9, 400e9, _TPU + "v6e"),
}
# Dense bf16, SXM boards, NVLink; https://www.nvidia.com/en-us/data-center/h100/ and a100/, h200/.
_GPUS = {
    "H100": (989e12, 3350e9, 450e9),
    "H200": (989e12, 4800e9, 450e9),
    "A100": (312e12, 2039e9, 300e9),
}

# What `device_kind` begins with, of TPUs; the longer names first.
_TPU_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6": "v6e"}


def known_peak_flops(device_kind: str) -> float | None:
    """Peak operations a second in bfloat16 of a kind of device; None if it is not known."""
    for begins, name in _TPU_KINDS.items():
        if device_kind.startswith(begins):
            return TPUS[name].flops
    return next((figures[0] for name, figures in _GPUS.items() if name in device_kind), None)


def accelerator(device: jax.Device) -> Chip:
    """The chip of a GPU or TPU that is here.

    Raises:
        UserError: It is of a kind that is not known.
    """
    kind = device.device_kind
    for begins, name in _TPU_KINDS.items():
        if kind.startswith(begins):
            return TPUS[name]
    found = [figures for name, figures in _GPUS.items() if name in kind]
    if not found:
        raise UserError(
            f"no figures are known for {kind!r}; known are {', '.join((*TPUS, *_GPUS))} "
            "(expandr_jax/planning/chips.py)"
        )
    capacity = (device.memory_stats() or {}).get("bytes_limit", 0)
    return Chip(kind, capacity, *found[0], "https://www.nvidia.com/en-us/data-center/")


def cpu(devices: int) -> Chip:
    """One of `devices` virtual devices that share this machine, measured: takes a second.

    A product of two matrices gives the operations, a copy the bandwidth; the other devices are
    reached through the same memory.
    """
    size = 1536
    x = jnp.ones((size, size), jnp.float32)
    y = jnp.ones(2**25, jnp.float32)
    flops = 2 * size**3 / _best(jax.jit(jnp.dot), x, x)
    bandwidth = 2 * y.nbytes / _best(jax.jit(lambda y: y + 1), y)
    memory = psutil.virtual_memory().total
    return Chip(
        "cpu", memory // devices, flops / devices, bandwidth / devices, bandwidth / devices,
        "measured here",
    )  # fmt: skip


def _best(function, *arguments) -> float:
    """Seconds of the quickest of a few calls."""
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
