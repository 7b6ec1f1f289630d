"""Devices to compile for: a TPU slice that need not exist, or devices of this machine."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from expandr_jax.errors import UserError
from expandr_jax.runtime import chips

_NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
TOPOLOGIES = "v5e:4x4, v5p:2x2x2, v6e:4x4, cpu:8, gpu, gpu:4, tpu or tpu:4"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind.

    Attributes:
        name: As it was asked for.
        devices: To make a mesh of; of a TPU these are descriptions that can only be compiled for.
        chip: What each can do.
        host_devices: Such as one process of a run has there, by itself.
    """

    name: str
    devices: Sequence[Any]
    chip: chips.Chip
    host_devices: Sequence[Any]

    @property
    def is_here(self) -> bool:
        """Whether the devices can be used, not only compiled for."""
        return not self.name.startswith(tuple(chips.TPUS))

    @property
    def hosts(self) -> int:
        """Processes of a run there, one on each host."""
        return len(self.devices) // len(self.host_devices)


def find_topology(name: str) -> Topology:
    """The devices that a name means.

    Args:
        name: "v5e:4x4" and so on: a slice of that shape, compiled for by libtpu without any TPU.
            "cpu:8": so many virtual devices of this machine's processor; jax must not be in use
            yet, or have as many. "gpu", "gpu:4", "tpu": those of this machine.

    Raises:
        UserError: There is no such kind or shape, or what it takes is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind in chips.TPUS:
        devices = _slice(name, kind, shape)
        host = _host_shape(devices, axes=1 + shape.count("x"))
        # A slice of its own: the compiler does not take a part of one.
        return Topology(name, devices, chips.TPUS[kind], _slice(name, kind, host))
    if kind not in ("cpu", "gpu", "tpu") or (shape and not re.fullmatch(r"[1-9]\d*", shape)):
        raise UserError(f"--topology={name}: expected something like {TOPOLOGIES}")
    devices = _local(kind, int(shape) if shape else None)
    chip = chips.cpu(len(devices)) if kind == "cpu" else chips.accelerator(devices[0])
    return Topology(name, devices, chip, devices)


def _slice(name: str, kind: str, shape: str) -> Sequence[Any]:
    # Where chips have two axes, a third makes libtpu abort the process.
    most, example = (2, "2x2x2") if kind == "v5p" else (1, "4x4")
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{1,{most}}}", shape):
        raise UserError(f"--topology={name}: expected chips by rows, as {kind}:{example}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs TPU's compiler, which runs anywhere: "
            'pip install -c requirements.lock -e ".[plan]"'
        )
    # Without these it looks for a TPU, asks the cloud's metadata server, and complains of neither.
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}")
    except Exception as error:  # libtpu's own, a RuntimeError or one of its subclasses.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--topology={name}: TPU's compiler knows no such slice: {reason}"
        ) from None
    return found.devices


def _host_shape(devices: Sequence[Any], axes: int) -> str:
    """Shape of the first process's chips, as a slice's shape is written."""
    coordinates = [device.coords[:axes] for device in devices if device.process_index == 0]
    return "x".join(str(1 + max(axis) - min(axis)) for axis in zip(*coordinates, strict=True))


def _local(kind: str, count: int | None) -> Sequence[Any]:
    if kind == "cpu" and count is not None:
        # jax may be in use already, and have enough.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)
    try:
        devices = jax.devices(kind)
    except RuntimeError:
        raise UserError(f"--topology={kind}: jax finds none here") from None
    if count is not None and len(devices) < count:
        raise UserError(f"--topology={kind}:{count}: there are {len(devices)} here")
    return devices[:count]
