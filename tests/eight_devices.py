"""What tests of train.plan plan for: the smoke config on eight virtual devices."""

import jax
from rich.console import Console

from configs import smoke
from expandr_jax.config import Config, read_config
from expandr_jax.planning.topology import Topology
from expandr_jax.runtime import chips

PROGRAMS = [
    "contrastive step",
    "corpus encoding",
    "prefill",
    "prompts to slots",
    "decode",
    "reference log-probabilities",
    "DPO step",
    "DPO dev losses",
    "exact search",
    "rewards",
    "retriever restored",
    "adapter restored",
    "base to the engine",
    "adapter merged for export",
]
# Those that have nothing of a model's to compute.
MOVES = ["prompts to slots", *PROGRAMS[10:13]]
CHIP = chips.Chip("cpu", 8 * chips.GIB, 1e12, 1e11, 1e10, "made up")
QUIET = Console(quiet=True)


def machine(chip=CHIP):
    """8 virtual devices of one host."""
    devices = jax.devices("cpu")[:8]
    return Topology("cpu:8", devices, chip, devices)


def smoke_on_meshes() -> Config:
    """The smoke config with a mesh for each phase, and as large a workload as those of a slice."""
    config = smoke.get_config()
    config.retriever.max_length = 64
    config.contrastive.batch_size = 1024
    config.contrastive.micro_batch = 128
    config.generator.slots = 512
    config.candidates.max_new_tokens = 512
    config.dpo.batch_size = 16
    config.dpo.prompt_length = 100
    config.dpo.response_length = 512
    config.mesh.contrastive = (2, 4, 1)
    config.mesh.sampling = (-1, 1, 2)
    config.mesh.dpo = (1, 8, 1)
    return read_config(config)
