"""The stage before step A in which a decoder learns what its blocks say of a text (LLaRA)."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.objectives.contrastive_checks import check_contrastive_batch
from expandr_jax.objectives.llara import (
    LlaraBatches,
    LlaraSettings,
    llara_setup,
    passage_pairs,
    stage_settings,
)
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.objectives.trained import divided, drops_out, joined, training_retriever
from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.flops import row_flops
from expandr_jax.training.setup import count_updates, section_optimizer
from expandr_jax.training.stage import on_devices, train_stage

PHASE = "llara"


def train_blocks(
    stage: TrainedStage,
    models: RetrieverModel,
    triples: Sequence[Triple],
    own: LlaraSettings,
    step_a: ContrastiveSettings,
    seed: int,
) -> Any:
    """The retriever's parameters after the stage, as each process can read them all.

    Args:
        stage: Where it is recorded and kept.
        models: The retriever's module and mesh.
        triples: Their documents are learned from, each once; no query is.
        own, step_a: The config's sections `llara` and `contrastive`.
        seed: That of the order of documents and of batches.

    Raises:
        UserError: The retriever has no blocks, there are too few texts, or training diverges.
    """
    mesh = models.contrastive_mesh
    settings, size = stage_settings(own, step_a)
    retriever = training_retriever(models.retriever, step_a)
    if retriever.pooling != "block":
        raise UserError(
            f"llara.epochs is {settings.epochs}, but the retriever's pooling is "
            f"{retriever.pooling!r}; expected retriever.pooling 'block'"
        )
    check_contrastive_batch(step_a, retriever, models.retriever_params, mesh, len(triples))
    texts = [*dict.fromkeys(text for t in triples for text in (*t.positives, *t.negatives))]
    drawn = (texts[i] for i in np.random.default_rng(seed).permutation(len(texts)))
    every = passage_pairs(drawn, own.passage_words)
    pairs = [*itertools.islice(every, own.pairs or None)]
    if len(pairs) < size:
        raise UserError(
            f"{len(pairs)} pairs of passages do not fill one batch of {size}; lower "
            "llara.passage_words or contrastive.batch_size"
        )
    stage.log.reporter.say(f"{PHASE}: {len(pairs)} pairs of passages, of {len(texts)} documents")
    batches = LlaraBatches(pairs, retriever, size, seed)
    updates = count_updates(settings, len(pairs) // size)
    steps = updates * settings.accumulation
    optimizer = section_optimizer(settings, updates)
    params = models.retriever_params
    setup = llara_setup(mesh, retriever, params, optimizer)
    held, trained = divided(retriever, params, seed)
    frozen = device_put(held, setup.frozen)
    rows = rows_here(mesh, size)
    key = jax.random.key(seed) if drops_out(retriever, step_a) else None
    identity = {
        "model": models.retriever_hash,
        "settings": hash_json([identity_of("llara", own), identity_of("contrastive", settings)]),
        "pairs": hash_json(pairs),
        "retriever": retriever.identity,
        "steps": steps,
    }

    flops = row_flops(retriever.module, params, bool(held))

    def batch(step: int) -> tuple[dict[str, Any], Contents]:
        arrays, tokens = batches.batch(step, rows)
        names = [f"pair {i}" for i in batches.indices(step)]
        return arrays, Contents(names, int(tokens.sum()), sum(map(flops, tokens.tolist())))

    trained = train_stage(
        stage,
        setup,
        device_put(trained, setup.shardings.params),
        on_devices(stage.log.processes, batch, mesh, rows, size),
        identity=identity,
        settings=settings,
        steps=steps,
        frozen=frozen,
        key=key,
    )
    return joined(held, whole(trained))
