"""A cross-encoder learns to score a query's relevant document above those that are not."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from expandr_jax.data.batches import batch_indices, pad
from expandr_jax.data.triples import Triple
from expandr_jax.files.records import hash_json
from expandr_jax.losses.reranking import RERANKING_LOSSES
from expandr_jax.models.cross_encoder import CrossEncoder, say_cut
from expandr_jax.models.identity import module_identity
from expandr_jax.objectives.settings import RerankerSettings
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.flops import row_flops
from expandr_jax.training.setup import (
    TrainingSetup,
    check_batch_size,
    count_updates,
    section_optimizer,
    set_up,
)
from expandr_jax.training.stage import on_devices, train_stage
from expandr_jax.training.train_state import TrainState
from expandr_jax.weights.trees import hash_tree, model_shardings


def reranking_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    key: jax.Array | None = None,
    *,
    module: nn.Module,
    settings: RerankerSettings,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update: (state, batch of `RerankingBatches`, key) -> (state, metrics).

    Dropout, if a key turns it on, is drawn from (key, step). "accuracy" is the share of queries
    whose relevant document scores above all others of theirs.
    """
    given = batch["given"]

    def mean_loss(params: Any) -> tuple[jax.Array, jax.Array]:
        # [queries, documents, length] to a row a pair.
        inputs = (batch[name].reshape(given.size, -1) for name in ("ids", "mask", "types"))
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, state.step)}
        scores = module.apply({"params": params}, *inputs, deterministic=key is None, rngs=rngs)
        scores = scores.reshape(given.shape)
        losses = RERANKING_LOSSES[settings.loss](scores, given)
        others = jnp.where(given[:, 1:], scores[:, 1:], -jnp.inf)
        return jnp.mean(losses), jnp.mean(scores[:, 0] > jnp.max(others, axis=1))

    (loss, accuracy), grads = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "accuracy": accuracy}
    return state.apply(grads, optimizer), metrics


def reranking_setup(
    mesh: Mesh,
    module: nn.Module,
    params: Any,
    settings: RerankerSettings,
    optimizer: optax.GradientTransformation,
) -> TrainingSetup:
    """Sets the training up, as the config's section `reranker` has it; `params` may be shapes."""
    module = module.clone(dtype=jnp.dtype(settings.compute_dtype), remat=settings.remat)
    step = functools.partial(reranking_step, module=module, settings=settings)
    shapes = jax.eval_shape(lambda params: params, params)
    return set_up(mesh, step, shapes, model_shardings(mesh, module, params), optimizer)


@dataclasses.dataclass(frozen=True)
class RerankingBatches:
    """Batches of queries, each with a relevant document and some that are not, as pairs of tokens.

    Which of a query's documents a step has depends on the seed, the step and the query alone.

    Attributes:
        triples: Training queries, each with a negative at least.
        encoder: Tokenizes pairs.
        size: Queries of a batch.
        negatives: Documents of a query that are not relevant; where it has fewer, the others are
            not `given`.
        seed: What is drawn by.
        names: What messages call the queries.
        cut: Counts of the pairs that it has made whether they were cut.
    """

    triples: Sequence[Triple]
    encoder: CrossEncoder
    size: int
    negatives: int
    seed: int
    names: Sequence[str]
    cut: Counter[bool] = dataclasses.field(default_factory=Counter, compare=False)

    def batch(
        self, step: int, rows: Any, flops: Callable[[int], float]
    ) -> tuple[dict[str, np.ndarray], Contents]:
        """Some rows of a step's arrays, padded as all are, and what the whole step is made of.

        `flops` says how many operations training on a pair of so many tokens takes.

        Returns:
            "ids", "mask" and "types" [rows, 1 + negatives, length] int32, "given" [rows, 1 +
            negatives] bool.
        """
        indices = batch_indices(self.seed, step, len(self.triples), self.size)
        pairs: list[tuple[list[int], list[int]]] = []
        given = np.ones((len(indices), 1 + self.negatives), bool)
        for row, number in enumerate(indices.tolist()):
            documents = self._documents(number, step)
            given[row, len(documents) :] = False
            # What is not given is the relevant document again.
            filled = documents + documents[:1] * (1 + self.negatives - len(documents))
            lost: list[bool] = []
            pairs += self.encoder.token_ids(self.triples[number].query, filled, lost.extend)
            self.cut.update(lost[: len(documents)])
        most = self.encoder.max_length
        ids, mask = pad(
            [tokens for tokens, _ in pairs], self.encoder.tokenizer.pad_token_id, longest=most
        )
        types, _ = pad([types for _, types in pairs], 0, ids.shape[1])
        shape = *given.shape, ids.shape[1]
        arrays = {"ids": ids, "mask": mask, "types": types}
        arrays = {name: array.reshape(shape) for name, array in arrays.items()}
        lengths = [len(tokens) for tokens, _ in pairs]
        named = [self.names[number] for number in indices]
        contents = Contents(named, sum(lengths), sum(map(flops, lengths)))
        return {n: array[rows] for n, array in (arrays | {"given": given}).items()}, contents

    def _documents(self, number: int, step: int) -> list[str]:
        triple, rng = self.triples[number], np.random.default_rng([self.seed, step, number])
        positive = triple.positives[rng.integers(len(triple.positives))]
        order = rng.permutation(len(triple.negatives))[: self.negatives]
        return [positive, *(triple.negatives[i] for i in order)]


def train_pair_scores(
    stage: TrainedStage,
    mesh: Mesh,
    encoder: CrossEncoder,
    params: Any,
    triples: Sequence[Triple],
    names: Sequence[str],
    settings: RerankerSettings,
    seed: int,
    evaluate: Callable[[Any], float] | None,
) -> Any:
    """A cross-encoder's trained parameters, as each process can read them all.

    Args:
        stage: Where it is recorded and kept.
        mesh: The devices.
        encoder, params: What it begins as.
        triples: At least a batch of them, each with a negative.
        names: What messages call them.
        settings: The config's section `reranker`.
        seed: That of the order of the triples, and of dropout.
        evaluate: Parameters to nDCG@10 on dev; None: the last ones are returned.

    Raises:
        UserError: The mesh cannot divide a batch, or training diverges.
    """
    size = settings.batch_size
    check_batch_size("reranker.batch_size", size, mesh)
    updates = count_updates(settings, len(triples) // size)
    steps = updates * settings.accumulation
    optimizer = section_optimizer(settings, updates)
    setup = reranking_setup(mesh, encoder.module, params, settings, optimizer)
    start = device_put(params, setup.shardings.params)
    batches = RerankingBatches(triples, encoder, size, settings.negatives, seed, names)
    rows = rows_here(mesh, size)
    key = jax.random.key(seed) if settings.dropout else None
    identity = {
        "model": hash_tree(params),
        "module": hash_json([module_identity(encoder.module), encoder.max_length]),
        "settings": hash_json(identity_of("reranker", settings)),
        # Without their margins, which older runs did not have and nobody reads here.
        "examples": hash_json([dataclasses.astuple(triple)[:-1] for triple in triples]),
        "steps": steps,
    }

    flops = row_flops(encoder.module, params, frozen=False)
    make = functools.partial(batches.batch, rows=rows, flops=flops)
    trained = train_stage(
        stage,
        setup,
        start,
        on_devices(stage.log.processes, make, mesh, rows, size),
        identity=identity,
        settings=settings,
        steps=steps,
        key=key,
        evaluate=evaluate,
        patience=settings.patience,
    )
    say_cut(stage.log.reporter.say, f"{stage.log.phase}, in training", batches.cut)
    return whole(trained)
