"""Trains the retriever contrastively, for `train.joint` or alone on a file of triples.

    python -m train.retriever --config=configs/retriever.py --workdir=DIR \
        --config.data.path=triples.jsonl --config.data.dev=BEIR_DIR

The triples are those of expandr_jax/data/triples.py. With a dev collection the weights that rank
it best are kept; they are written to DIR/export/retriever. The same command again continues.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.triples import Triple
from expandr_jax.loading import load_retriever_model
from expandr_jax.objectives.contrastive_stage import ContrastiveRound, train_contrastive
from expandr_jax.objectives.llara import LLARA, train_blocks
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.pair import RetrieverModel, check_meshes, model_hashes
from expandr_jax.ranking.dev import retriever_on_dev
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import whole
from expandr_jax.vectors.encoder import Kind
from train.encoding import run_retriever
from train.export import ADAPTER, write_retriever, write_retriever_adapter
from train.launch import launch_training
from train.triples import dev_of, say_leaks, triple_names, triples_of


def train_retriever(
    run: Run,
    models: RetrieverModel,
    params: Any,
    triples: Sequence[Triple],
    *,
    phase: str,
    round_: int,
    samples: int,
    ids: Sequence[str],
    kind: Kind = "document",
    evaluate: Callable[[Any], float] | None = None,
    updates: int | None = None,
    settings: ContrastiveSettings | None = None,
) -> Any:
    """One round of step A.

    Args:
        run: The workdir; checkpoints go to checkpoints/PHASE.
        models: The retriever's module and mesh.
        params: Weights to start from.
        triples: Training queries with their documents and expansions.
        kind: How the latter are read.
        phase: "retriever", or the name of a baseline on plain queries.
        round_: Counts from 0.
        samples: Expansions a query; 0 trains on plain queries.
        ids: What messages call the examples.
        evaluate: Weights to a dev measure, called every `config.eval_every` updates and at the end;
            None trains all steps.
        updates: How many; None: those of `config.epochs` passes over the examples.
        settings: How it is trained; None: as the config's section `contrastive` has it.

    Returns:
        The trained parameters, as each process can read them all; with `evaluate`, those that it
        was highest for.

    Raises:
        UserError: A setting does not fit the examples or the mesh, or training diverges.
    """
    config = run.config
    own = ContrastiveRound(
        triples, ids, samples, kind, settings or config.contrastive, config.seed, round_, updates
    )
    stage = run.trained_stage(phase, round_)
    return train_contrastive(stage, models, params, own, config.mesh.workers, evaluate)


def train_on_triples(
    config: Mapping[str, Any] | Config, workdir: str | os.PathLike, console: Console
) -> None:
    """Trains a retriever alone, or continues; writes it to export/retriever of the workdir.

    Args and errors are as of `train.joint.train_joint`, the config as from configs/retriever.py.
    """
    config = read_config(config)
    check_meshes(config.mesh, ("contrastive", "encoding"))
    run = Run(workdir, config, console)
    with run.phase("data"):
        dev, triples = dev_of(run.config.data), triples_of(run)
        if dev is not None:
            say_leaks(triples, dev, run.reporter)
    with run.phase("models"):
        models = load_retriever_model(config)
        run.check_models(model_hashes(models))

    told = False

    def evaluate(params: Any) -> float:
        nonlocal told
        retriever = run_retriever(run, models, dev.corpus, whole(params), "dev")
        value = retriever_on_dev(retriever, dev, config.evaluation)
        if not told:  # The same texts are cut each time.
            retriever.release()
            told = True
        return value

    params = models.retriever_params
    if config.llara.epochs:
        with run.phase(LLARA):
            stage, own = run.trained_stage(LLARA, keep=1), run.config
            params = train_blocks(stage, models, triples, own.llara, own.contrastive, own.seed)
    with run.phase("retriever"):
        params = train_retriever(
            run,
            models,
            params,
            triples,
            phase="retriever",
            round_=0,
            samples=config.expansion.train_samples if any(t.expansions for t in triples) else 0,
            ids=triple_names(triples, config.data),
            evaluate=None if dev is None else evaluate,
        )

    def export() -> None:
        if not run.checksums.intact("export/retriever"):
            write_retriever(config, directory, models.retriever, params)
            run.checksums.record("export/retriever")
        name = f"export/{ADAPTER}"
        if config.contrastive.lora.rank and not run.checksums.intact(name):
            to = run.path(name)
            write_retriever_adapter(run.config, to, models.retriever, params, run.address)
            run.checksums.record(name)

    directory = run.path("export", "retriever")
    with run.phase("export"):
        run.processes.once(export)
    console.print(f"retriever: {run.where(directory)}", soft_wrap=True)
    run.close()


if __name__ == "__main__":
    launch_training(train_on_triples)
