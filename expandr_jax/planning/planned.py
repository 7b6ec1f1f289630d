"""What a plan knows of a program before it is compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.generation.settings import GeneratorSettings
from expandr_jax.models.decoder import cast_weights
from expandr_jax.models.stack import initial_shapes
from expandr_jax.pair import phase_mesh
from expandr_jax.planning.topology import Topology
from expandr_jax.sharding import batch_divisor, with_shardings
from expandr_jax.training.train_state import TrainState
from expandr_jax.vectors.settings import RetrieverSettings
from expandr_jax.weights.families import example_inputs, find_family, model_config
from expandr_jax.weights.fields import Fields
from expandr_jax.weights.hf import open_model
from expandr_jax.weights.source import locate
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING
from expandr_jax.weights.trees import model_shardings

# What no setting says of the workload.
# What a prompt has that is learned from on-policy, and a query that is distilled.
PROMPT_TOKENS = 100
DEPTH = 100  # Documents found for each query.
UPDATES = 2  # How many a training has changes no program of it.
# The paper's run: queries of step B, their candidates and these' tokens, pairs and epochs, examples
# and epochs.
PAPER = {"queries": 100_000, "candidates": 32, "tokens": 512, "pairs": 30_000, "dpo_epochs": 2,
         "examples": 709_000, "contrastive_epochs": 3}  # fmt: skip
REFERENCE = "reference log-probabilities"  # A program of every step B.
Calls = Callable[[str, int], int]  # (a program, texts) -> how often it is called for so many.


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program with the shapes of its arguments, and what it computes.

    Attributes:
        program: The jitted function.
        arguments: ShapeDtypeStructs with shardings on the mesh.
        mesh: The devices; None: one of them.
        parameters: The tree among the arguments whose memory is that of parameters.
        module: The model.
        rows: Queries, texts, pairs or slots of the whole batch, or of one share of it.
        tokens: Number of tokens of all texts of the batch.
        forward_flops: Operations of one forward pass over the batch.
        moved: Bytes that one call moves between each device and its memory, at least.
        change: What to change where it does not fit.
        passes: Times that the weights are gone through, backward passes and those that compute
            again, to save memory, included; each counts as a forward pass.
        needed: Those passes that the model needs.
        turns: Micro-batches, each of which makes those passes.
        learns: Whether gradients of all parameters are summed over the mesh.
        shares: Processes that each run it at the same time, on meshes of their own.
        resident: Bytes on each device that the run holds for other phases meanwhile.
        values: Arguments with made-up numbers -> the same with those that a call's time depends on:
            tokens and masks, which slots are active. None: it depends on no numbers.
        units: Times that such a call does what is planned: decode's tokens.
    """

    program: Any
    arguments: Sequence[Any]
    mesh: Mesh | None
    parameters: Any
    module: nn.Module
    rows: int
    tokens: int
    forward_flops: int
    moved: float
    change: str
    passes: int = 1
    needed: int = 1
    turns: int = 1
    learns: bool = False
    shares: int = 1
    resident: int = 0
    values: Callable[..., Sequence[Any]] | None = None
    units: int = 1

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def model_flops(self) -> int:
        """Operations of one call that the model needs."""
        return self.needed * self.forward_flops

    @property
    def run_flops(self) -> int:
        """`model_flops`, and the operations of what is recomputed to save memory."""
        return self.passes * self.forward_flops

    def beside(self, held: int) -> "Planned":
        """This program in a run that holds `held` more bytes on each device."""
        return dataclasses.replace(self, resident=self.resident + held)


def random_tokens(module: nn.Module, *shape: int) -> np.ndarray:
    """Token ids of a model's vocabulary."""
    numbers = np.random.default_rng(0).integers(0, module.config.vocab_size, shape)
    return numbers.astype(np.int32)


def untrained(state: TrainState) -> TrainState:
    """With an optimizer state as before the first step: not every number is one."""
    return state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))


def of_retriever_alone(config: Config) -> bool:
    """Whether a config is `train.retriever`'s: it has no generator, or `train.joint` refuses it."""
    named = config.generator.source or config.generator.shape
    return not named or config.retriever.pooling == SPLADE_POOLING or config.llara.epochs > 0


def planned_mesh(config: Config, phase: str, topology: Topology) -> Mesh:
    """A phase's mesh on a topology, as `phase_mesh` makes it and refuses it."""
    return phase_mesh(config.mesh, phase, topology.devices, topology.host_devices)


def check_rows(rows: int, mesh: Mesh, phase: str, what: str) -> None:
    """Raises UserError where the workload's rows cannot be split over a phase's mesh."""
    if rows % batch_divisor(mesh):
        raise UserError(
            f"mesh.{phase}: {rows} {what} cannot be split over {batch_divisor(mesh)} devices "
            "(data times fsdp); give the tensor axis more"
        )


def params_on(mesh: Mesh, module: nn.Module, params: Any) -> Any:
    """Shapes of a model's parameters with the shardings that they have on a mesh."""
    return with_shardings(params, model_shardings(mesh, module, params))


def param_shapes(module: nn.Module, dtype: Any) -> dict[str, Any]:
    """Parameters of a module in the types that a run keeps them in."""
    # What is recomputed changes no shape, and a search asks for the same ones many times.
    return dict(_param_shapes(module.clone(remat="none"), dtype))


@functools.lru_cache(maxsize=8)
def _param_shapes(module: nn.Module, dtype: Any) -> dict[str, Any]:
    variables = initial_shapes(module, *example_inputs(module))
    return jax.eval_shape(lambda params: cast_weights(params, dtype), nn.unbox(variables["params"]))


def shape_module(
    section: RetrieverSettings | GeneratorSettings, name: str, dtype: str
) -> nn.Module:
    """The model of a config's section, as messages call it, without its weights.

    Raises:
        UserError: Neither a shape nor a source that is here is named.
    """
    if section.shape:
        found = Fields.read(Path(section.shape))
        kind = found.values.get("model_type")
    else:
        found, kind = shape_of_source(section.source, name)
    config = model_config(found, kind)
    return find_family(found.where, kind).module(config, dtype=jnp.dtype(dtype))


def shape_of_source(source: str, name: str) -> tuple[Fields, str | None]:
    """config.json and kind of a model that is here; nothing is fetched."""
    path = Path(source).expanduser()
    if not source or not (source.startswith("package:") or path.exists()):
        raise UserError(
            f"{name}.source is {source!r}, which is not here; {name}.shape can name a config.json "
            "of its shape"
        )
    path = locate(source)
    if path.is_dir() and not list(path.glob("model*.safetensors*")):
        found = Fields.read(path / "config.json")
        return found, found.values.get("model_type")
    files = open_model(source)
    return files.config, files.model_type
