"""Trains the retriever contrastively, for `train.joint` or alone on a file of triples.

    python -m train.retriever --config=configs/retriever.py --workdir=DIR \
        --config.data.path=triples.jsonl --config.data.dev=BEIR_DIR

The triples are those of expandr_jax/data/triples.py. With a dev collection the weights that rank
it best are kept; they are written to DIR/export/retriever. The same command again continues.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse
from rich.console import Console

from expandr_jax import metrics
from expandr_jax.config import Config, read_config
from expandr_jax.data.documents import ids_of, texts_of
from expandr_jax.data.triples import Triple
from expandr_jax.files.scratch import scratch_array
from expandr_jax.loading import load_retriever_model
from expandr_jax.metrics import CHOSEN_BY
from expandr_jax.objectives.contrastive_stage import ContrastiveRound, train_contrastive
from expandr_jax.objectives.llara import LLARA, train_blocks
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.pair import RetrieverModel, check_meshes, model_hashes
from expandr_jax.runtime.run import Run
from expandr_jax.search import build_index, search_named
from expandr_jax.sharding import whole
from expandr_jax.vectors.corpus import CorpusRetriever
from expandr_jax.vectors.encoder import TEXTS_AT_ONCE, Kind
from expandr_jax.vectors.sparse import build_sparse, sparse_vectors
from expandr_jax.weights.sparse_encoder import SPLADE_POOLING
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


def kept_vectors(
    retriever: CorpusRetriever, texts: Sequence[str], progress: Callable[[int], None]
) -> np.ndarray:
    """Vectors of documents, [texts, dim] float32, for process 0 in a file without a name.

    All processes call it together. None holds more than a block of texts and of vectors.
    """
    kept = np.zeros((0, 0), np.float32)
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        block = retriever.encode(
            texts[first : first + TEXTS_AT_ONCE], "document", progress=progress
        )
        if retriever.processes.is_main:
            if not first:
                shape = len(texts), block.shape[1]
                kept = scratch_array(math.prod(shape), np.float32, "vectors").reshape(shape)
            kept[first : first + len(block)] = block
    return kept


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

    def evaluate(params: Any) -> float:
        ids, documents = list(dev.qrels["dev"]), texts_of(dev.corpus)
        retriever = run_retriever(run, models, dev.corpus, whole(params), "dev")
        queries = [dev.queries[query] for query in ids]
        with run.reporter.progress("dev: documents encoded", len(documents)) as advance:
            if models.retriever.pooling == SPLADE_POOLING:
                width = models.retriever.module.config.vocab_size
                sparse = build_sparse(retriever.encode, documents, width, "dev", advance)
                encoded = scipy.sparse.vstack([*sparse_vectors(retriever.encode, queries, "query")])
            else:
                sparse, vectors = None, kept_vectors(retriever, documents, advance)
                encoded = retriever.encode(queries, "query")

        def measure() -> float:
            index = build_index(vectors, "exact") if sparse is None else sparse
            found = search_named(
                index.search,
                ids,
                encoded,
                ids_of(dev.corpus),
                config.evaluation.depth,
                drop_identical_ids=config.evaluation.drop_identical_ids,
                excluded=dev.excluded,
                above=0.0 if models.retriever.pooling == SPLADE_POOLING else -math.inf,
            )
            return metrics.mean(metrics.evaluate(found, dev.qrels["dev"], (CHOSEN_BY,))[CHOSEN_BY])

        return run.processes.once(measure)

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
