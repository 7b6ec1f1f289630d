"""Trains a re-ranker, a cross-encoder, on a file of triples: those that a run has mined, say.

    python -m train.reranker --config=configs/reranker.py --workdir=DIR \
        --config.data.path=RUN/round-0/triples.jsonl --config.data.dev=RUN/data

With a dev collection the weights are kept that best rank what BM25 finds first there. They are
written to DIR/export/reranker; the rows `rerank:SYSTEM` take it as evaluation.rerank.source. The
same command again continues.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.models.identity import tokenizer_identity
from expandr_jax.objectives.reranking import train_pair_scores
from expandr_jax.pair import check_meshes, phase_mesh
from expandr_jax.ranking.dev import reranker_on_dev
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.run import Run
from expandr_jax.weights.cross_encoder import export_cross_encoder, load_cross_encoder
from expandr_jax.weights.trees import hash_tree
from train.encoding import run_words
from train.launch import launch_training
from train.triples import dev_of, say_leaks, triple_names, triples_of

RERANKER = "reranker"


def train_reranker(
    config: Mapping[str, Any] | Config, workdir: str | os.PathLike, console: Console
) -> None:
    """Trains a cross-encoder, or continues; writes it to export/reranker of the workdir.

    Args and errors are as of `train.joint.train_joint`, the config as from configs/reranker.py.
    """
    config = read_config(config)
    check_meshes(config.mesh, ("contrastive",))
    run, settings = Run(workdir, config, console), config.reranker
    if not settings.source:
        raise UserError("reranker.source is ''; expected the model that the re-ranker begins as")
    with run.phase("data"):
        dev, triples = dev_of(run.config.data), triples_of(run)
        if dev is not None:
            say_leaks(triples, dev, run.reporter)
        triples = _with_negatives(run.config, triples, run.reporter)
    with run.phase("models"):
        encoder, params = load_cross_encoder(
            settings.source, max_length=settings.max_length, seed=config.seed
        )
        identity = {
            "reranker.source": hash_tree(params),
            "re-ranker's tokenizer": tokenizer_identity(encoder.tokenizer),
        }
        run.check_models(identity)
    stage, evaluate = run.trained_stage(RERANKER), None
    if dev is not None:
        words = run_words(run, dev.corpus, "dev")
        own = run.config.evaluation
        evaluate = reranker_on_dev(encoder, dev, words, own, run.reporter, run.processes)
    with run.phase(RERANKER):
        mesh, names = phase_mesh(config.mesh, "contrastive"), triple_names(triples, config.data)
        params = train_pair_scores(
            stage, mesh, encoder, params, triples, names, settings, config.seed, evaluate
        )
    directory = run.path("export", RERANKER)

    def export() -> None:
        if not run.checksums.intact(f"export/{RERANKER}"):
            export_cross_encoder(directory, encoder, params, jnp.dtype(config.export.dtype))
            run.checksums.record(f"export/{RERANKER}")

    with run.phase("export"):
        run.processes.once(export)
    console.print(f"reranker: {run.where(directory)}", soft_wrap=True)
    run.close()


def _with_negatives(config: Config, triples: Sequence[Triple], reporter: Reporter) -> list[Triple]:
    """The triples that have negatives; says how many have none."""
    kept = [triple for triple in triples if triple.negatives]
    if not kept:
        raise UserError(
            f"{config.data.path}: no training query has a negative; those that a run mined are "
            "in its round-0/triples.jsonl"
        )
    if left_out := len(triples) - len(kept):
        reporter.say(f"{left_out} training queries have no negative, and are left out")
    if len(kept) < (size := config.reranker.batch_size):
        raise UserError(
            f"{len(kept)} training queries do not fill one batch of {size}; lower "
            "reranker.batch_size"
        )
    return kept


if __name__ == "__main__":
    launch_training(train_reranker)
