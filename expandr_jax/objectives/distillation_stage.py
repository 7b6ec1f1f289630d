"""Trains a query tower: a copy of the retriever whose plain queries are compared with constants.

Batches are `distillation.DistillationBatches`; what it learns is a `Lesson`.
"""

import functools
from collections.abc import Callable
from typing import Any

from expandr_jax.files.records import hash_json
from expandr_jax.objectives.distillation import DistillationBatches, Lesson, distillation_setup
from expandr_jax.objectives.settings import DistillSettings
from expandr_jax.objectives.trained import divided, joined
from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.flops import row_flops
from expandr_jax.training.setup import count_updates, section_optimizer
from expandr_jax.training.stage import on_devices, train_stage
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
        cut: list[bool] = []
        ids = models.encoder.tokenize([*lesson.queries.values()], "query", cut.extend)
        if any(cut):
            told = f"{sum(cut)} queries are longer than the retriever reads, and lose their end"
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
