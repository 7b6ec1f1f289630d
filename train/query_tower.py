"""Trains a query tower: a copy of the retriever whose plain queries are compared with constants."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax import metrics
from expandr_jax.data.training_data import TrainingData
from expandr_jax.files.records import hash_json
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.objectives.distillation import (
    Compared,
    DistillationBatches,
    DistillationLoss,
    distillation_setup,
)
from expandr_jax.objectives.trained import divided, joined, training_retriever
from expandr_jax.pair import RetrieverModel
from expandr_jax.ranking.ranker import Ranker, Searches
from expandr_jax.ranking.systems import DISTILLED, parse_system
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.setup import count_updates, section_optimizer
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.weights.trees import hash_tree
from train.steps import on_devices, row_flops, train_steps


def train_query_tower(
    run: Run,
    models: RetrieverModel,
    data: TrainingData,
    ours: CorpusRetriever,
    queries: Mapping[str, str],
    compared: Compared,
    *,
    losses: DistillationLoss,
    phase: str,
    name: str,
    of: Sequence[str],
    round_: int,
) -> Any:
    """The parameters of a query tower, as each process can read them all.

    Args:
        run, models, data: The run; checkpoints go to checkpoints/NAME.
        ours: The retriever that it begins as, with the documents that dev queries search.
        queries: Query id -> query, of those that it learns from.
        compared: What these are compared with.
        losses: What is learned of that.
        phase: Its name in metrics.jsonl.
        name: Sets it apart from other towers of the run.
        of: Hashes of what it learns from.
        round_: The run's last round.

    Raises:
        UserError: Training diverges.
    """
    settings, seed, mesh = run.config.distill, run.config.seed, models.contrastive_mesh
    retriever = training_retriever(models.retriever, run.config.contrastive)
    batches = DistillationBatches(
        models.encoder.tokenize([*queries.values()], "query"),
        [*queries],
        compared,
        settings.batch_size,
        seed,
        retriever.tokenizer.pad_token_id,
        retriever.max_length,
    )
    updates = count_updates(settings, len(queries) // settings.batch_size)
    steps = updates * settings.accumulation
    optimizer = section_optimizer(settings, updates)
    setup = distillation_setup(mesh, retriever, ours.params, losses, settings, optimizer)
    held, trained = divided(retriever, ours.params, seed)
    frozen = device_put(held, setup.frozen)
    start = device_put(trained, setup.shardings.params)
    rows = rows_here(mesh, settings.batch_size)
    identity = {
        "model": hash_tree(ours.params),
        "settings": hash_json(identity_of("distill", settings)),
        "retriever": retriever.identity,
        "learned": hash_json([*of]),
        "steps": steps,
    }

    flops = row_flops(retriever.module, ours.params, bool(held))
    make = functools.partial(batches.batch, rows=rows, flops=flops)
    trained = train_steps(
        run,
        setup,
        start,
        on_devices(run, make, mesh, rows, settings.batch_size),
        name=name,
        identity=identity,
        settings=settings,
        steps=steps,
        phase=phase,
        round_=round_,
        frozen=frozen,
        evaluate=(lambda trained: _on_dev(run, data, ours, joined(held, trained)))
        if settings.eval_every
        else None,
    )
    return joined(held, whole(trained))


def _on_dev(run: Run, data: TrainingData, ours: CorpusRetriever, params: Any) -> float:
    """nDCG@10 of the dev queries with such a tower; all processes call it together."""
    tower = dataclasses.replace(ours, params=whole(params), documents=ours)
    judged = data.collection.qrels["dev"]
    ranker = Ranker(
        {query: data.collection.queries[query] for query in judged},
        Searches(lambda _: None, lambda *_: tower, ours.texts),
        lambda _: None,
        lambda _: None,
        run.config.evaluation,
        is_main=run.processes.is_main,
        excluded=data.collection.excluded,
    )
    _ = ours.corpus
    found = ranker.search(parse_system(DISTILLED), None)
    value = 0.0
    if run.processes.is_main:
        value = metrics.mean(metrics.evaluate(found, judged, (CHOSEN_BY,))[CHOSEN_BY])
    return run.processes.once(lambda: value)
