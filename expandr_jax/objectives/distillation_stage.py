"""Trains a query tower: a copy of the retriever whose plain queries are compared with constants.

Batches are `distillation.DistillationBatches`; what it learns is a `Lesson`, whose constants
`compared_with_teacher` makes where there is a teacher.
"""

import functools
import pathlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from expandr_jax.files.records import hash_json
from expandr_jax.objectives.distillation import (
    Compared,
    DistillationBatches,
    Lesson,
    distillation_setup,
    query_tokens,
    targets_of,
)
from expandr_jax.objectives.settings import DistillSettings
from expandr_jax.objectives.trained import divided, joined
from expandr_jax.pair import RetrieverModel
from expandr_jax.ranking.teacher import found_by_teacher
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.flops import row_flops
from expandr_jax.training.setup import count_updates, section_optimizer
from expandr_jax.training.stage import on_devices, train_stage
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.stored import StoredVectors, open_vectors
from expandr_jax.weights.trees import hash_tree


def train_query_tower(
    stage: TrainedStage,
    models: RetrieverModel,
    params: Any,
    lesson: Lesson,
    settings: DistillSettings,
    seed: int,
    evaluate: Callable[[Any], float],
) -> Any:
    """The parameters of a query tower, as each process can read them all.

    Args:
        stage: Where it is recorded and kept.
        models: The mesh, and the retriever as it is trained, from `training_retriever`.
        params: Those of the retriever that it begins as.
        lesson: What it learns.
        settings: The config's section `distill`.
        seed: That of the order of the queries.
        evaluate: Parameters to nDCG@10 on dev, as often as the settings say, if at all.

    Raises:
        UserError: Training diverges.
    """
    mesh, retriever = models.contrastive_mesh, models.retriever

    @functools.cache  # Where all steps are done, no query is tokenized.
    def batches() -> DistillationBatches:
        cut: Counter[bool] = Counter()
        ids = query_tokens(models.encoder, [*lesson.queries.values()], cut.update)
        if cut[True]:
            told = f"{cut[True]} queries are longer than the retriever reads, and lose their end"
            stage.log.reporter.say(told)
        return DistillationBatches(
            ids,
            [*lesson.queries],
            lesson.compared,
            settings.batch_size,
            seed,
            retriever.tokenizer.pad_token_id,
            retriever.max_length,
        )

    updates = count_updates(settings, len(lesson.queries) // settings.batch_size)
    steps = updates * settings.accumulation
    optimizer = section_optimizer(settings, updates)
    setup = distillation_setup(mesh, retriever, params, lesson.losses, settings, optimizer)
    held, trained = divided(retriever, params, seed)
    frozen = device_put(held, setup.frozen)
    start = device_put(trained, setup.shardings.params)
    rows = rows_here(mesh, settings.batch_size)
    identity = {
        "model": hash_tree(params),
        "settings": hash_json(identity_of("distill", settings)),
        "retriever": retriever.identity,
        "learned": hash_json([*lesson.hashes]),
        "steps": steps,
    }

    flops = row_flops(retriever.module, params, bool(held))

    def make(step: int) -> tuple[dict[str, Any], Contents]:
        return batches().batch(step, rows=rows, flops=flops)

    trained = train_stage(
        stage,
        setup,
        start,
        on_devices(stage.log.processes, make, mesh, rows, settings.batch_size),
        identity=identity,
        prepare=batches,
        settings=settings,
        steps=steps,
        frozen=frozen,
        evaluate=(lambda trained: evaluate(joined(held, trained))) if settings.eval_every else None,
    )
    return joined(held, whole(trained))


def compared_with_teacher(
    settings: DistillSettings,
    ours: CorpusRetriever,
    targets: pathlib.Path,
    checksums: Checksums,
    name: str,
) -> Compared:
    """What the student's batches have of its teacher; all processes call it together.

    Args:
        settings: The config's section `distill`.
        ours: The retriever, whose documents are searched.
        targets: The file of the teacher's vectors.
        checksums, name: Where what the teacher finds is kept.
    """
    vectors = open_vectors(targets)
    if not settings.kl_weight:
        return targets_of(vectors)

    def found() -> np.ndarray | None:
        index = ours.corpus.index  # Each process has its part of it.
        if not ours.processes.is_main:
            return None
        with ours.reporter.progress("distillation: queries searched", len(vectors)) as advance:
            return found_by_teacher(index, vectors, settings.depth, advance)

    rows = np.load(checksums.array(name, found), mmap_mode="r", allow_pickle=False)
    return targets_of(vectors, document_vectors(ours), rows)


def document_vectors(ours: CorpusRetriever) -> np.ndarray | StoredVectors:
    """The documents' vectors, [documents, dim], by each process from their file."""
    _ = ours.corpus
    return open_vectors(ours.path)
