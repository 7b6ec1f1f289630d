"""The models and where they run, built from a config once."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from expandr_jax.data.records import hash_json
from expandr_jax.errors import UserError
from expandr_jax.generation.memory import cache_type, check_memory, plan_memory
from expandr_jax.generation.sampler import Sampler, sampling_memory, slots_of_a_process
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import init_lora
from expandr_jax.models.retriever import Retriever
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.sharding import adapter_shardings, make_mesh, place, whole
from expandr_jax.training.checkpoint import hash_tree
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.weights.hf import load_generator, load_retriever

SAMPLING_STAGES = ("expansion", "candidates", "answer")  # Sections of a config that sample texts.
PHASES = ("contrastive", "encoding", "sampling", "dpo")  # Each may have a mesh of its own.
OF_ONE_PROCESS = ("encoding", "sampling")  # Each process does its share of the texts by itself.
# Words, cases, accents, digits, spaces, lines, another script: what tokenizers treat differently.
PROBES = ("Naïve CAFÉ  state-of-the-art", "x = 3.14159 # 1,000\n\treturn", "検索 поиск 🔍", "")


@dataclasses.dataclass(frozen=True)
class RetrieverModel:
    """What step A uses.

    Attributes:
        contrastive_mesh: The devices of all processes, as step A has them.
        retriever: The retriever; its parameters change from round to round.
        retriever_params: Its weights before any training, as this process can read them all.
        retriever_hash: sha256 of those weights.
        encoder: Texts to vectors, on a mesh of this process's devices.
    """

    contrastive_mesh: Mesh
    retriever: Retriever
    retriever_params: Any
    retriever_hash: str
    encoder: TextEncoder


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
        shapes = adapter_shapes(self.generator, self.generator_params)
        return adapter_shardings(self.dpo_mesh, self.base_shardings, shapes)


@dataclasses.dataclass(frozen=True)
class Models(RetrieverModel, GeneratorModel):
    """The pair that a run trains."""


def phase_mesh(config: ml_collections.ConfigDict, phase: str, devices: Any = None) -> Mesh:
    """The mesh of a phase.

    Args:
        config: The config's `mesh` section.
        phase: "contrastive", "encoding", "sampling" or "dpo".
        devices: None: all that there are; of several processes, for a phase of OF_ONE_PROCESS,
            those of this one.

    Raises:
        UserError: It does not fit the devices.
    """
    own = getattr(config, phase)
    if own and (len(own) != 3 or not all(isinstance(size, int) for size in own)):
        raise UserError(f"mesh.{phase} is {own}; expected (data, fsdp, tensor), or () for mesh's")
    sizes = own or (config.data, config.fsdp, config.tensor)
    if devices is not None or jax.process_count() == 1 or phase not in OF_ONE_PROCESS:
        return make_mesh(*sizes, devices=devices)
    try:
        return make_mesh(*sizes, devices=jax.local_devices())
    except UserError as error:
        raise UserError(
            f"mesh.{phase}: {error}; there are {jax.process_count()} processes, and this phase "
            "has those of one at a time"
        ) from None


def check_meshes(config: ml_collections.ConfigDict, phases: Sequence[str] = PHASES) -> None:
    """Refuses meshes that do not fit the devices, before anything is loaded.

    Args:
        config: The config's `mesh` section.
        phases: Those of the program.

    Raises:
        UserError: Naming the phase and its mesh.
    """
    for phase in phases:
        try:
            phase_mesh(config, phase)
        except UserError as error:
            named = str(error).startswith("mesh.")
            raise UserError(str(error) if named else f"mesh.{phase}: {error}") from None


def adapter_shapes(generator: Generator, params: Any) -> Any:
    """Shapes of an adapter of the generator's LoRA settings on these parameters, or shapes."""
    init = functools.partial(init_lora, config=generator.module.lora)
    return jax.eval_shape(init, jax.random.key(0), params)


def load_models(config: ml_collections.ConfigDict, progress: Callable[[int], None]) -> Models:
    """Loads the config's models onto its mesh.

    Args:
        config: The whole config.
        progress: Called with 1 after each of the two models.

    Raises:
        UserError: A model cannot be found, read or verified, the mesh does not fit, or sampling
            would need more memory than there is.
    """
    retriever = load_retriever_model(config)
    progress(1)
    generator = load_generator_model(config)
    if not config.generator.server.url:
        _check_sampling(config, generator)
    progress(1)
    return Models(**{**vars(retriever), **vars(generator)})


def load_retriever_model(config: ml_collections.ConfigDict) -> RetrieverModel:
    """The config's retriever; errors as of `load_models`."""
    source = config.retriever
    mesh = phase_mesh(config.mesh, "contrastive")
    retriever, params = load_retriever(
        source.source,
        pooling=source.pooling or None,
        normalize=source.normalize,
        max_length=source.max_length,
        compute_dtype=jnp.dtype(source.compute_dtype),
        sha256=source.sha256,
        mesh=mesh,
    )
    params = whole(params)
    encoder = TextEncoder(
        retriever,
        phase_mesh(config.mesh, "encoding"),
        tokens_per_batch=source.tokens_per_batch // jax.process_count(),
    )
    return RetrieverModel(mesh, retriever, params, hash_tree(params), encoder)


def load_generator_model(config: ml_collections.ConfigDict) -> GeneratorModel:
    """The config's generator with its LoRA settings; errors as of `load_models`.

    The base never changes, so one copy in a small type serves sampling and DPO alike.
    """
    source = config.generator
    mesh = phase_mesh(config.mesh, "dpo")
    sampling_mesh = phase_mesh(config.mesh, "sampling")
    generator, params = load_generator(
        source.source,
        dtype=jnp.dtype(base_type(source)),
        compute_dtype=jnp.dtype(source.compute_dtype),
        sha256=source.sha256,
        mesh=mesh,
    )
    generator = dataclasses.replace(
        generator, module=generator.module.clone(lora=config.lora, remat=source.remat)
    )
    adapter_shapes(generator, params)  # Settings that do not fit the model are said now.
    # Devices of a processor have one copy between them, where each holds the whole.
    params = place(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    readable = whole(params)
    return GeneratorModel(mesh, sampling_mesh, generator, params, readable, hash_tree(readable))


def make_sampler(
    models: GeneratorModel,
    config: ml_collections.ConfigDict,
    processes: Processes,
    reporter: Reporter,
    directory: pathlib.Path,
) -> Sampler:
    """The sampler of a generator; what a server writes is kept in the directory."""
    return Sampler(
        models.generator,
        models.sampling_params,
        models.generator_hash,
        models.sampling_mesh,
        config.generator,
        config.seed,
        processes,
        reporter,
        directory / f"server{processes.suffix}.jsonl",
    )


def base_type(section: ml_collections.ConfigDict) -> str:
    """The type that a config's `generator` section keeps the base in."""
    return section.weights or section.compute_dtype


def penalizes(config: ml_collections.ConfigDict) -> bool:
    """Whether a stage of the whole config samples with a repetition penalty."""
    return any(getattr(config, stage).repetition_penalty != 1 for stage in SAMPLING_STAGES)


def _check_sampling(config: ml_collections.ConfigDict, model: GeneratorModel) -> None:
    """Refuses, before hours of work, texts that are too many or too long for the memory."""
    settings = config.generator
    longest = max(getattr(config, stage).max_new_tokens for stage in SAMPLING_STAGES)
    module = model.generator.module
    plan = plan_memory(
        module,
        model.generator_params,
        slots=slots_of_a_process(settings, model.sampling_mesh),
        buckets=tuple(settings.prompt_buckets),
        length=max(settings.prompt_buckets) + longest,
        cache_dtype=cache_type(module),
        mesh=model.sampling_mesh,
        penalize=penalizes(config),
    )
    check_memory(plan, sampling_memory(settings))


def model_hashes(models: RetrieverModel | GeneratorModel) -> dict[str, str]:
    """Hashes of the weights, with their type, and of the tokenizers, by what a message calls them.

    Args:
        models: One of the two, or both.
    """
    hashes = {}
    if isinstance(models, RetrieverModel):
        hashes["retriever.source, its weights"] = models.retriever_hash
        hashes["retriever.source, its tokenizer"] = _hash_tokenizer(models.retriever.tokenizer)
    if isinstance(models, GeneratorModel):
        hashes["generator.source, its weights"] = models.generator_hash
        hashes["generator.source, its tokenizer"] = _hash_tokenizer(models.generator.tokenizer)
    return hashes


def _hash_tokenizer(tokenizer: Any) -> str:
    """sha256 over its vocabulary, what it makes of some texts, and its chat template."""
    ids = [[int(i) for i in tokenizer([text])["input_ids"][0]] for text in PROBES]
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    template = getattr(tokenizer, "chat_template", None)
    return hash_json([sorted(vocabulary.items()), ids, template])
