"""Loads the models of a config onto its meshes."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.generation.memory import check_memory, plan_memory
from expandr_jax.generation.sampler import Sampler, sampling_memory, slots_of_a_process
from expandr_jax.generation.settings import GeneratorSettings
from expandr_jax.generation.slots import EngineShape
from expandr_jax.models.lora import split_adapter
from expandr_jax.models.retriever import Retriever
from expandr_jax.objectives.trained import divided
from expandr_jax.pair import GeneratorModel, Models, RetrieverModel, adapter_shapes, phase_mesh
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.sharding import bytes_on_device, device_put_shared, whole
from expandr_jax.vectors.encoder import TextEncoder
from expandr_jax.vectors.settings import RetrieverSettings
from expandr_jax.vectors.sparse import SparseCorpus
from expandr_jax.weights.hf import load_generator, load_retriever
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING, load_sparse_encoder
from expandr_jax.weights.store import merge_stored
from expandr_jax.weights.trees import hash_tree


def load_models(
    config: Config, progress: Callable[[int], None], *, trains_retriever: bool = False
) -> Models:
    """Loads the config's models onto its mesh.

    Args:
        config: The whole config.
        progress: Called with 1 after each of the two models.
        trains_retriever: Whether the retriever as it came will stay beside one that is trained.

    Raises:
        UserError: A model cannot be found, read or verified, the mesh does not fit, or sampling
            would need more memory than there is.
    """
    if config.retriever.pooling == SPLADE_POOLING:
        raise UserError(
            "retriever.pooling is 'splade', for train.retriever alone; a sparse encoder that "
            "systems search by is evaluation.splade.source"
        )
    if config.llara.epochs:
        raise UserError(
            "llara.epochs is above 0, for train.retriever alone; take its export/retriever as "
            "retriever.source"
        )
    retriever = load_retriever_model(config)
    progress(1)
    generator = load_generator_model(config)
    if not config.generator.server.url:
        # A trained one shares a frozen base.
        copies = 2 if trains_retriever and not config.contrastive.lora.rank else 1
        _check_sampling(config, generator, copies * _bytes_held(retriever.retriever_params))
    progress(1)
    return Models(**{**vars(retriever), **vars(generator)})


def load_retriever_model(config: Config) -> RetrieverModel:
    """The config's retriever; errors as of `load_models`."""
    source = config.retriever
    mesh = phase_mesh(config.mesh, "contrastive")
    foretells = config.contrastive.query_likelihood_weight > 0 or config.llara.epochs > 0
    retriever, params = _load_retriever(
        source, mesh=mesh, dtype=source.weights, with_head=foretells
    )
    if (lora := config.contrastive.lora).rank:
        module = retriever.module.clone(lora=lora)
        retriever = dataclasses.replace(retriever, module=module)
        divided(retriever, params, config.seed)  # Settings that do not fit the model are said now.
    params = whole(params)
    encoder = TextEncoder(
        retriever,
        phase_mesh(config.mesh, "encoding"),
        tokens_per_batch=source.tokens_per_batch // jax.process_count(),
    )
    normalize = config.contrastive.normalize
    return RetrieverModel(mesh, retriever, params, hash_tree(params), encoder, normalize)


def merged_retriever(config: Config, retriever: Retriever, params: Any) -> tuple[Retriever, Any]:
    """A retriever to export: with its adapter, if it has one, merged into its base.

    That is in float32, whatever type the run has it in; it stays in its files.
    """
    _, adapter = split_adapter(params)
    if adapter is None:
        return retriever, params
    stored, base = stored_retriever(config)
    return stored, merge_stored(base, adapter, config.contrastive.lora)


def stored_retriever(config: Config) -> tuple[Retriever, Any]:
    """The config's retriever, whose parameters stay in their files; errors as of `load_models`."""
    return _load_retriever(config.retriever, in_files=True)


def _load_retriever(
    section: RetrieverSettings,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    in_files: bool = False,
    with_head: bool = False,
) -> tuple[Retriever, Any]:
    if section.pooling == SPLADE_POOLING:
        other = section.bidirectional, section.normalize, section.end_token, in_files
        if any(other) or section.weights != "float32":
            raise UserError(
                "retriever.pooling is 'splade': retriever.bidirectional, normalize and end_token, "
                "weights but float32 and adapters are not for sparse vectors"
            )
        load: Callable[..., Any] = load_sparse_encoder
    else:
        load = functools.partial(
            load_retriever,
            pooling=section.pooling or None,
            normalize=section.normalize,
            bidirectional=section.bidirectional,
            dtype=dtype,
            in_files=in_files,
            end_token=section.end_token,
            with_head=with_head,
        )
    return load(
        section.source,
        max_length=section.max_length,
        query_length=section.query_length,
        query_prompt=section.query_prompt,
        document_prompt=section.document_prompt,
        compute_dtype=jnp.dtype(section.compute_dtype),
        sha256=section.sha256,
        mesh=mesh,
    )


def sparse_corpus(
    config: Config, texts: Sequence[str], directory: pathlib.Path, reporter: Reporter
) -> SparseCorpus:
    """Documents as the config's sparse encoder searches them; its index is kept in a directory."""
    section = config.evaluation.splade
    with reporter.progress("documents encoded sparsely", len(texts)) as advance:
        return SparseCorpus(section.source, section.max_length, texts, directory, advance)


def load_generator_model(config: Config) -> GeneratorModel:
    """The config's generator with its LoRA settings; errors as of `load_models`.

    The base never changes, so one copy in a small type serves sampling and DPO alike.
    """
    source = config.generator
    mesh = phase_mesh(config.mesh, "dpo")
    sampling_mesh = phase_mesh(config.mesh, "sampling")
    generator, params = load_generator(
        source.source,
        dtype=base_type(source),
        compute_dtype=jnp.dtype(source.compute_dtype),
        sha256=source.sha256,
        mesh=mesh,
    )
    generator = dataclasses.replace(
        generator,
        module=generator.module.clone(lora=config.lora, remat=source.remat),
        **source.chat,
    )
    adapter_shapes(generator.module, params)  # Settings that do not fit the model are said now.
    # Devices of a processor have one copy between them, where each holds the whole.
    params = device_put_shared(params, jax.tree.map(lambda leaf: leaf.sharding, params))
    readable = whole(params)
    return GeneratorModel(mesh, sampling_mesh, generator, params, readable, hash_tree(readable))


def make_sampler(
    models: GeneratorModel,
    config: Config,
    processes: Processes,
    reporter: Reporter,
    directory: pathlib.Path | None = None,
) -> Sampler:
    """The sampler of a generator.

    What a server writes is kept in the directory; without one texts are sampled here, even where
    the config names a server.
    """
    return Sampler(
        models.generator,
        models.sampling_params,
        models.generator_hash,
        models.sampling_mesh,
        config.generator,
        config.seed,
        processes,
        reporter,
        directory and directory / f"server{processes.suffix}.jsonl",
        held=models.generator_params,
    )


def base_type(section: GeneratorSettings) -> str:
    """The type that a config's `generator` section keeps the base in."""
    return section.weights or section.compute_dtype


def sampling_stages(config: Config) -> tuple[str, ...]:
    """Sections of the whole config that sample texts."""
    before = config.warm_start == "best" or config.demonstrations.prompts
    rewarded = config.step_b_kind.rewarded
    also = ("candidates",) if before and rewarded != "candidates" else ()
    return ("expansion", *also, rewarded, "answer")


def penalizes(config: Config, stages: Sequence[str] = ()) -> bool:
    """Whether one of these stages samples with a repetition penalty; (): any of the config."""
    stages = stages or sampling_stages(config)
    return any(getattr(config, stage).repetition_penalty != 1 for stage in stages)


def _check_sampling(config: Config, model: GeneratorModel, retrievers: int) -> None:
    """Refuses, before hours of work, texts that are too many or too long for the memory.

    `retrievers` are bytes of each device that retrievers take beside the generator. A limit of the
    config is what sampling alone may take.
    """
    kind, settings = config.step_b_kind, config.learned
    by_themselves = [stage for stage in sampling_stages(config) if stage != kind.section]
    beside = {} if config.generator.memory_limit else {"retrievers": retrievers}
    _check_engine(config, model, by_themselves, beside)
    if kind.on_policy:
        setup = kind.trainer(model, settings).setup
        state = setup.shapes(adapter_shapes(model.generator.module, model.generator_params))
        # It stays while texts are sampled, and so do the engine's weights while it learns.
        beside["adapter and optimizer"] = bytes_on_device(state)
        _check_engine(config, model, [kind.section], beside, settings.texts)


def _bytes_held(params: Any) -> int:
    """Bytes of a device that parameters take; what lies on the host takes none."""
    return bytes_on_device([p for p in jax.tree.leaves(params) if isinstance(p, jax.Array)])


def _check_engine(
    config: Config,
    model: GeneratorModel,
    stages: Sequence[str],
    beside: Mapping[str, int],
    texts: int | None = None,
) -> None:
    """Refuses what some stages sample, with so much memory taken beside, so many texts at most."""
    settings = config.generator
    longest = max(getattr(config, stage).max_new_tokens for stage in stages)
    shape = EngineShape(
        module=model.generator.module,
        slots=slots_of_a_process(settings, model.sampling_mesh, texts),
        length=max(settings.prompt_buckets) + longest,
        max_new_tokens=longest,
        seed=config.seed,
        eos_ids=tuple(model.generator.eos_ids),
        mesh=model.sampling_mesh,
        penalize=penalizes(config, stages),
    )
    plan = plan_memory(shape, model.generator_params, settings.prompt_buckets)
    check_memory({**plan, **beside}, sampling_memory(settings))
