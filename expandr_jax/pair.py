"""The pair of models that a run trains, and the devices that each phase has."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.models.decoder import Decoder
from expandr_jax.models.generator import Generator
from expandr_jax.models.identity import hash_tokenizer
from expandr_jax.models.lora import init_lora
from expandr_jax.models.retriever import Retriever
from expandr_jax.sharding import adapter_shardings, make_mesh
from expandr_jax.training.settings import MeshSettings
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.vectors.query import Normalize

PHASES = ("contrastive", "encoding", "sampling", "dpo")  # Each may have a mesh of its own.
OF_ONE_PROCESS = ("encoding", "sampling")  # Each process does its share of the texts by itself.


@dataclasses.dataclass(frozen=True)
class RetrieverModel:
    """What step A uses.

    Attributes:
        contrastive_mesh: The devices of all processes, as step A has them.
        retriever: The retriever; its parameters change from round to round.
        retriever_params: Its weights before any training, as this process can read them all.
        retriever_hash: sha256 of those weights.
        encoder: Texts to vectors, on a mesh of this process's devices.
        normalize: Where vectors of expanded queries are brought to unit length, in training as in
            all searches; see `expanded_query`.
    """

    contrastive_mesh: Mesh
    retriever: Retriever
    retriever_params: Any
    retriever_hash: str
    encoder: TextEncoder
    normalize: Normalize


@dataclasses.dataclass(frozen=True)
class GeneratorModel:
    """What step B uses.

    Attributes:
        dpo_mesh: The devices of all processes, as training has them.
        sampling_mesh: Those of this process, as sampling has them.
        generator: The language model, with its LoRA settings.
        generator_params: Its frozen base weights, on `dpo_mesh`.
        sampling_params: The same, as this process can read them all: on the host where the mesh is
            of several processes.
        generator_hash: sha256 of the base weights.
    """

    dpo_mesh: Mesh
    sampling_mesh: Mesh
    generator: Generator
    generator_params: Any
    sampling_params: Any
    generator_hash: str

    @property
    def base_shardings(self) -> Any:
        """Where each of `generator_params` lies."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.generator_params)

    @property
    def adapter_shardings(self) -> Any:
        """Where each side of an adapter belongs in training."""
        shapes = adapter_shapes(self.generator.module, self.generator_params)
        return adapter_shardings(self.dpo_mesh, self.base_shardings, shapes)


@dataclasses.dataclass(frozen=True)
class Models(RetrieverModel, GeneratorModel):
    """The pair that a run trains."""


def phase_mesh(
    config: MeshSettings, phase: str, devices: Any = None, of_one_process: Any = None
) -> Mesh:
    """The mesh of a phase: of all devices, or of a process's own where a run shares texts out.

    Args:
        config: The config's `mesh` section.
        phase: "contrastive", "encoding", "sampling" or "dpo".
        devices: All that there are; None: jax's.
        of_one_process: Those of one process, for a phase of OF_ONE_PROCESS; None: this one's.

    Raises:
        UserError: It does not fit the devices, naming the phase.
    """
    sizes = getattr(config, phase) or (config.data, config.fsdp, config.tensor)
    devices, own = devices or jax.devices(), of_one_process or jax.local_devices()
    processes, among = len(devices) // len(own), ""
    if phase in OF_ONE_PROCESS and processes > 1:
        devices = own
        among = f"; there are {processes} processes, and this phase has those of one at a time"
    try:
        return make_mesh(*sizes, devices=devices)
    except UserError as error:
        raise UserError(f"mesh.{phase}: {error}{among}") from None


def check_meshes(config: MeshSettings, phases: Sequence[str] = PHASES) -> None:
    """Refuses a program's meshes that do not fit the devices, before anything is loaded."""
    for phase in phases:
        phase_mesh(config, phase)


def adapter_shapes(module: Decoder, params: Any) -> Any:
    """Shapes of an adapter of the module's LoRA settings on these parameters, or shapes."""
    init = functools.partial(init_lora, config=module.lora)
    return jax.eval_shape(init, jax.random.key(0), params)


def model_hashes(models: RetrieverModel | GeneratorModel) -> dict[str, str]:
    """Hashes of all that models' outputs depend on, by what a message calls it.

    Weights with their type, chat template, tokenizer, and the rest that files say: prompts,
    pooling, lengths, ends of text, options of the module. What is named first is told first.
    """
    hashes = {}
    for name in ("retriever", "generator"):
        if model := getattr(models, name, None):
            hashes[f"{name}.source, its weights"] = getattr(models, f"{name}_hash")
            if name == "generator":
                template = hash_json(model.tokenizer.chat_template)
                hashes[f"{name}.source, its chat template"] = template
            hashes[f"{name}.source, its tokenizer"] = hash_tokenizer(model.tokenizer)
            hashes[f"{name}.source, what its files say"] = model.identity
    return hashes
