"""Encoders' programs, as shapes: texts to dense vectors or to sparse ones, pairs to scores."""

import functools
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from expandr_jax.config import Config
from expandr_jax.errors import UserError
from expandr_jax.models.cross_encoder import pair_logits
from expandr_jax.models.retriever import Retriever
from expandr_jax.planning.planned import (
    Planned,
    param_shapes,
    params_on,
    random_tokens,
    shape_of_source,
)
from expandr_jax.planning.topology import Topology
from expandr_jax.sharding import (
    batch_divisor,
    batch_sharding,
    bytes_on_device,
    make_mesh,
    with_shardings,
)
from expandr_jax.training.flops import forward_flops
from expandr_jax.vectors.encoder import TOKENS_PER_BATCH, embedder
from expandr_jax.weights.families import family_of, find_family, model_config
from expandr_jax.weights.sparse_encoder import SPARSE_MODEL_TYPES, SPLADE_POOLING


def sparse_encoding(config: Config, topology: Topology) -> Planned:
    """A batch of documents for rows that rest on splade, all of which one process encodes."""
    section = config.evaluation.splade
    found, kind = shape_of_source(section.source, "evaluation.splade")
    module = sparse_module(find_family(found.where, kind).module(model_config(found, kind)))
    length = min(section.max_length, module.config.max_positions)
    retriever = Retriever(module, SPLADE_POOLING, False, length, "", "", None, None)
    mesh, params = make_mesh(devices=topology.host_devices), param_shapes(module, jnp.float32)
    change = "a smaller evaluation.splade.max_length"
    return encoded(retriever, params, mesh, TOKENS_PER_BATCH // length, change)


def scored_pairs(config: Config, stage: str, topology: Topology) -> Planned:
    """A batch of pairs of a row `STAGE:SYSTEM`, as long as they may be, on one device."""
    section = getattr(config.evaluation, stage)
    found, kind = shape_of_source(section.source, f"evaluation.{stage}")
    head = find_family(found.where, kind).pair_head
    if head is None:
        raise UserError(f"{found.where}: model_type {kind!r} scores no pairs")
    module = head.module(model_config(found, kind), found)
    rows, shape = section.rows, module.config
    length = min(section.max_length, shape.max_positions)
    on_one = SingleDeviceSharding(topology.devices[0])
    params = with_shardings(param_shapes(module, jnp.float32), on_one)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=on_one)
    # The head reads a token of a pair.
    forward = forward_flops(module, {"encoder": params["encoder"]}, rows, length)
    return Planned(
        program=types.SimpleNamespace(lower=functools.partial(pair_logits.lower, module)),
        arguments=(params, tokens, tokens, tokens),
        mesh=None,
        parameters=params,
        module=module,
        rows=rows,
        tokens=rows * length,
        forward_flops=forward + 2 * rows * shape.hidden_size * (shape.hidden_size + 1),
        moved=bytes_on_device(params),
        change=f"a smaller evaluation.{stage}.rows",
        values=lambda params, *_: (
            params,
            random_tokens(module, rows, length),
            *np.ones((2, rows, length), np.int32),
        ),
    )


def sparse_module(module: nn.Module) -> nn.Module:
    """The sparse encoder of an encoder's shape."""
    head = family_of(module).masked_head
    if head is None:
        kind, known = type(module).__name__, ", ".join(SPARSE_MODEL_TYPES)
        raise UserError(f"a sparse encoder is of type {known}; this shape is a {kind}'s")
    return head.module(module.config, module.dtype)


def encoded(
    retriever: Retriever, params: Any, mesh: Mesh, rows: int, change: str, shares: int = 1
) -> Planned:
    """A batch of about so many texts, as long as they may be, in each of `shares` processes."""
    length, module, divisor = retriever.max_length, retriever.module, batch_divisor(mesh)
    rows = max(1, rows // divisor) * divisor
    params = params_on(mesh, module, params)
    texts = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=batch_sharding(mesh))
    return Planned(
        program=embedder(mesh, retriever),
        arguments=(params, texts, texts),
        mesh=mesh,
        parameters=params,
        module=module,
        rows=rows,
        tokens=rows * length,
        forward_flops=vector_flops(retriever, params, rows, length),
        moved=bytes_on_device(params) * mesh.shape["fsdp"],
        change=change,
        shares=shares,
        values=lambda params, *_: (
            params,
            random_tokens(module, rows, length),
            np.ones((rows, length), np.int32),
        ),
    )


def vector_flops(retriever: Retriever, params: Any, rows: int, length: int) -> int:
    """Operations of texts' vectors; of sparse ones each token's scores of the vocabulary, too."""
    logits = rows * length if retriever.pooling == SPLADE_POOLING else 0
    return forward_flops(retriever.module, params, rows, length, logits=logits)
