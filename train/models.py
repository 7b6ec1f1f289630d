"""The models and where they run, built from a config once."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from expandr_jax.checkpoint import hash_tree
from expandr_jax.encoding import TextEncoder
from expandr_jax.errors import UserError
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import LoraConfig
from expandr_jax.models.retriever import Retriever
from expandr_jax.sharding import make_mesh
from expandr_jax.stored_vectors import DTYPES
from expandr_jax.weights.hf import load_generator, load_retriever


@dataclasses.dataclass(frozen=True)
class RetrieverModel:
    """What step A uses.

    Attributes:
        mesh: The devices.
        retriever: The retriever; its parameters change from round to round.
        retriever_params: Its weights before any training.
        retriever_hash: sha256 of those weights.
        encoder: Texts to vectors.
    """

    mesh: Mesh
    retriever: Retriever
    retriever_params: Any
    retriever_hash: str
    encoder: TextEncoder


@dataclasses.dataclass(frozen=True)
class GeneratorModel:
    """What step B uses.

    Attributes:
        mesh: The devices.
        generator: The language model, with its LoRA settings.
        generator_params: Its frozen base weights, in the compute type.
        generator_hash: sha256 of the base weights.
    """

    mesh: Mesh
    generator: Generator
    generator_params: Any
    generator_hash: str


@dataclasses.dataclass(frozen=True)
class Models(RetrieverModel, GeneratorModel):
    """The pair that a run trains, on one mesh."""


def load_models(config: ml_collections.ConfigDict, progress: Callable[[int], None]) -> Models:
    """Loads the config's models onto its mesh.

    Args:
        config: The whole config.
        progress: Called with 1 after each of the two models.

    Raises:
        UserError: A model cannot be found, read or verified, or the mesh does not fit.
    """
    mesh = make_mesh(**config.mesh)
    retriever = load_retriever_model(config, mesh)
    progress(1)
    generator = load_generator_model(config, mesh)
    progress(1)
    return Models(**{**vars(retriever), **vars(generator)})


def load_retriever_model(config: ml_collections.ConfigDict, mesh: Mesh) -> RetrieverModel:
    """The config's retriever; errors as of `load_models`."""
    source = config.retriever
    if source.vectors not in DTYPES:
        raise UserError(f"retriever.vectors is {source.vectors!r}; expected {', '.join(DTYPES)}")
    retriever, params = load_retriever(
        source.source,
        pooling=source.pooling or None,
        normalize=source.normalize,
        max_length=source.max_length,
        compute_dtype=jnp.dtype(source.compute_dtype),
        sha256=source.sha256,
    )
    encoder = TextEncoder(retriever, mesh, tokens_per_batch=source.tokens_per_batch)
    return RetrieverModel(mesh, retriever, params, hash_tree(params), encoder)


def load_generator_model(config: ml_collections.ConfigDict, mesh: Mesh) -> GeneratorModel:
    """The config's generator with its LoRA settings; errors as of `load_models`.

    The base never changes, so one copy in the compute type serves sampling and DPO alike.
    """
    source = config.generator
    dtype = jnp.dtype(source.compute_dtype)
    generator, params = load_generator(source.source, sha256=source.sha256, compute_dtype=dtype)
    lora = LoraConfig(**config.lora)
    generator = dataclasses.replace(
        generator, module=generator.module.clone(lora=lora, remat=source.remat)
    )
    params = jax.tree_util.tree_map_with_path(
        # Norms compute in float32 and keep their scales so; products use the compute type only.
        lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(dtype),
        params,
    )
    return GeneratorModel(mesh, generator, params, hash_tree(params))
