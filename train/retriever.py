"""Trains the retriever contrastively, for `train.joint` or alone on a file of triples.

    python -m train.retriever --config=configs/retriever.py --workdir=DIR \
        --config.data.path=triples.jsonl --config.data.dev=BEIR_DIR

The triples are those of expandr_jax/data/triples.py. With a dev collection the weights that rank
it best are kept; they are written to DIR/export/retriever. The same command again continues.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from rich.console import Console

from expandr_jax import metrics
from expandr_jax.data.batches import batch_indices
from expandr_jax.data.examples import triple_examples
from expandr_jax.data.records import hash_json
from expandr_jax.data.training_triples import read_dev, read_training_triples, say_leaks
from expandr_jax.errors import UserError
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.model_hashes import model_hashes
from expandr_jax.models.anchordr import AnchorDr
from expandr_jax.objectives.contrastive import (
    ContrastiveExample,
    draw_passages,
    make_batch,
    stays_plain,
)
from expandr_jax.pair import RetrieverModel, check_meshes, load_retriever_model
from expandr_jax.planning.flops import TRAINING, forward_flops
from expandr_jax.ranking.dense import EncodedQueries, dense_run
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.search import build_index
from expandr_jax.sharding import batch_sharding, put, replicated, whole
from expandr_jax.training.batch_checks import check_contrastive_batch
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.early_stopping import train_with_dev
from expandr_jax.training.loop import fit
from expandr_jax.training.setup import contrastive_config, training_retriever
from expandr_jax.training.steps import contrastive_program, model_shardings
from expandr_jax.training.train_state import OptimizerConfig, TrainState, make_optimizer
from expandr_jax.vectors.corpus import encode_texts
from expandr_jax.weights.export import export_encoder, export_retriever
from train.launch import define_config, define_processes, define_workdir, launch, make_console
from train.settings import check_settings


def train_retriever(
    run: Run,
    models: RetrieverModel,
    params: Any,
    examples: Sequence[ContrastiveExample],
    config: ml_collections.ConfigDict,
    *,
    phase: str,
    round_: int,
    samples: int,
    ids: Sequence[str] | None = None,
    evaluate: Callable[[Any], float] | None = None,
) -> Any:
    """One round of step A.

    Args:
        run: The workdir; checkpoints go to checkpoints/PHASE.
        models: The retriever's module and mesh.
        params: Weights to start from.
        examples: Training queries with their documents and expansions.
        config: The config's `contrastive` section.
        phase: "retriever", or "fine-tuned" for the baseline on plain queries.
        round_: Counts from 0.
        samples: Expansions a query; 0 trains on plain queries.
        ids: What messages call the examples; None: their numbers, from 0.
        evaluate: Weights to a dev measure, called every `config.eval_every` updates and at the end;
            None trains all steps.

    Returns:
        The trained parameters, as each process can read them all; with `evaluate`, those that it
        was highest for.

    Raises:
        UserError: A setting does not fit the examples or the mesh, or training diverges.
    """
    names = [str(i) for i in range(len(examples))] if ids is None else ids
    _check(config, models, examples, samples, names)
    batches = len(examples) // config.batch_size
    updates = max(1, round(config.epochs * batches / config.accumulation))
    steps = updates * config.accumulation
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=config.learning_rate,
            total_steps=updates,
            warmup_steps=min(config.warmup_steps, updates // 2),
            clip_norm=config.clip_norm,
            weight_decay=config.weight_decay,
            accumulation=config.accumulation,
        )
    )
    mesh = models.contrastive_mesh
    retriever = training_retriever(models.retriever, config)
    placed = model_shardings(mesh, retriever.module, params)
    params = start = put(params, placed)
    if config.learn_temperature:
        log_temperature = put(jnp.log(jnp.float32(config.temperature)), replicated(mesh))
        start = {"retriever": params, "log_temperature": log_temperature}
        placed = {"retriever": placed, "log_temperature": replicated(mesh)}
    # From the start as each step leaves it, so that a restored state is, too.
    places = TrainState.shardings(mesh, placed, start, optimizer)
    step_fn = contrastive_program(
        mesh,
        places,
        retriever=retriever,
        config=contrastive_config(config, samples),
        optimizer=optimizer,
    )
    seed, pad_id = run.config.seed, models.retriever.tokenizer.pad_token_id
    dropout_key = jax.random.fold_in(jax.random.key(seed), round_) if config.dropout else None

    lengths = None
    if config.length_window:
        lengths = np.array([_longest(example, samples) for example in examples])

    def chosen(step: int) -> dict[int, ContrastiveExample]:
        """The examples of a step as it sees them, by their numbers."""
        number = round_ * steps + step
        epoch = number // (len(examples) // config.batch_size)
        drawn = {}
        indices = batch_indices(
            seed, number, len(examples), config.batch_size, lengths, config.length_window
        )
        for i in indices.tolist():
            example = draw_passages(examples[i], config.negatives, seed=seed, epoch=epoch, query=i)
            if stays_plain(config.plain_share, seed=seed, step=number, query=i):
                example = dataclasses.replace(example, expansions=())
            drawn[i] = example
        return drawn

    @functools.cache
    def flops(length: int) -> int:
        return forward_flops(models.retriever.module, params, 1, length)

    def batch(step: int) -> tuple[dict[str, Any], Contents]:
        drawn, longest = chosen(step), models.retriever.max_length
        made = make_batch([*drawn.values()], pad_id, samples, config.negatives, longest=longest)
        if run.processes.count > 1:
            made = put(made, batch_sharding(mesh))
        return made, contents(drawn)

    def contents(drawn: dict[int, ContrastiveExample]) -> Contents:
        texts = []
        for example in drawn.values():
            negatives = (passage.ids for passage in example.negatives)
            texts += [example.query, example.positive, *example.expansions[:samples], *negatives]
        lengths = [len(text) for text in texts]
        named = [names[i] for i in drawn]
        return Contents(named, sum(lengths), TRAINING * sum(map(flops, lengths)))

    identity = {
        "model": models.retriever_hash,
        "settings": hash_json(config.to_dict()),
        "examples": hash_json([_hash_example(example) for example in examples]),
        "steps": steps,
    }
    checkpoints = Checkpoints(
        run.checkpoints(phase),
        identity,
        keep=run.config.keep,
        keep_period=steps,
        agree=run.processes.all,
    )

    log = run.training_log(phase, round_)

    # Evaluated in between, it goes on from its checkpoint each time, as after a restart.
    def train(last: int) -> Any:
        """The weights after step `last` of this round."""
        state = fit(
            log,
            TrainState.create(start, optimizer, places),
            lambda state, batch: step_fn(state, batch, dropout_key),
            batch,
            first_step=round_ * steps,
            steps=last,
            checkpoints=checkpoints,
            save_every=config.save_every * config.accumulation,
        )
        return state.params["retriever"] if config.learn_temperature else state.params

    if evaluate is None:
        return whole(train(steps))
    journal = run.path("work", f"round-{round_}", f"{phase}-dev.jsonl")
    best = train_with_dev(
        log,
        CommonJournal(journal, run.processes),
        params,
        train,
        evaluate,
        best=Checkpoints(
            run.checkpoints(f"{phase}-best"), identity, keep=1, agree=run.processes.all
        ),
        steps=steps,
        every=config.eval_every * config.accumulation,
        patience=config.patience,
    )
    return whole(best)


def _longest(example: ContrastiveExample, samples: int) -> int:
    """Tokens of the longest text that may be used of an example."""
    passages = [*example.other_positives, *example.negatives]
    texts = [example.query, example.positive, *example.expansions[:samples]]
    return max(map(len, [*texts, *(passage.ids for passage in passages)]))


def _hash_example(example: ContrastiveExample) -> str:
    query = [int(token) for token in example.query]
    return hash_json([example.positive_text, query, [n.text for n in example.negatives]])


def _check(
    config: ml_collections.ConfigDict,
    models: RetrieverModel,
    examples: Sequence[ContrastiveExample],
    samples: int,
    names: Sequence[str],
) -> None:
    check_contrastive_batch(config, models, len(examples))
    learned = (config.info_nce_weight, config.margin_mse_weight, config.kl_weight)
    expanded = samples and config.plain_share < 1 and any(e.expansions for e in examples)
    if not any(learned) and not expanded:
        raise UserError(
            "contrastive.invariance_weight alone is above 0, but no training query is expanded: "
            "there is nothing to learn"
        )
    if config.negatives and not any(e.negatives for e in examples):
        raise UserError(
            f"contrastive.negatives is {config.negatives}, but no training query has a negative"
        )
    if config.margin_mse_weight or config.kl_weight:
        if not config.negatives:
            raise UserError("a teacher's scores need contrastive.negatives above 0")
        for name, example in zip(names, examples, strict=True):
            passages = [*example.other_positives, *example.negatives]
            if None in (example.positive_score, *(p.score for p in passages)):
                raise UserError(
                    f"training query {name} has no teacher's scores; without them set "
                    "contrastive.margin_mse_weight and kl_weight to 0"
                )


def train_on_triples(
    config: ml_collections.ConfigDict, workdir: str | os.PathLike, console: Console
) -> None:
    """Trains a retriever alone, or continues; writes it to export/retriever of the workdir.

    Args:
        config: As from configs/retriever.py.
        workdir: Where everything goes.
        console: Where progress is shown.

    Raises:
        UserError: Something the user gave is wrong; what was done so far stays.
    """
    check_settings(config)
    check_meshes(config.mesh, ("contrastive", "encoding"))
    run = Run(workdir, config, console)
    with run.phase("data"):
        dev, triples = read_dev(run), read_training_triples(run)
        if dev is not None:
            say_leaks(run, triples, dev)
    with run.phase("models"):
        models = load_retriever_model(config)
        run.check_models(model_hashes(models))
        examples = triple_examples(triples, models.encoder)

    def evaluate(params: Any) -> float:
        params, ids = whole(params), list(dev.qrels["dev"])
        with run.progress("dev: documents encoded", len(dev.corpus)) as advance:
            documents = list(dev.corpus.values())
            vectors = encode_texts(run, models, params, documents, "document", advance)
        queries = [dev.queries[query] for query in ids]
        encoded = EncodedQueries(ids, encode_texts(run, models, params, queries, "query"))

        def measure() -> float:
            found = dense_run(
                build_index(vectors, "exact"),
                list(dev.corpus),
                encoded,
                None,
                normalize=config.contrastive.normalize,
                depth=config.evaluation.depth,
                drop_identical_ids=config.evaluation.drop_identical_ids,
            )
            return metrics.mean(metrics.evaluate(found, dev.qrels["dev"], (CHOSEN_BY,))[CHOSEN_BY])

        return run.processes.once(measure)

    file = os.path.basename(config.data.path or config.data.url)
    with run.phase("retriever"):
        params = train_retriever(
            run,
            models,
            models.retriever_params,
            examples,
            config.contrastive,
            phase="retriever",
            round_=0,
            samples=config.expansion.train_samples if any(t.expansions for t in triples) else 0,
            ids=[f"{file}:{triple.line}" for triple in triples],
            evaluate=None if dev is None else evaluate,
        )

    def export() -> None:
        if not run.seals.intact("export/retriever"):
            anchordr = isinstance(models.retriever.module, AnchorDr)
            write = export_encoder if anchordr else export_retriever
            write(directory, models.retriever, params, jnp.dtype(config.export.dtype))
            run.seals.seal("export/retriever")

    directory = run.path("export", "retriever")
    with run.phase("export"):
        run.processes.once(export)
    console.print(f"retriever: {run.where(directory)}", soft_wrap=True)
    run.close()


def main(_: Any) -> None:
    train_on_triples(flags.FLAGS.config, flags.FLAGS.workdir, make_console())


def define_flags() -> None:
    define_config()
    define_workdir()
    define_processes()


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
