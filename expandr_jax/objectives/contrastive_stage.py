"""A round of step A: what its triples become, and the steps by which the retriever learns them.

Batches are `contrastive_steps.ContrastiveBatches`; the step is `contrastive.contrastive_setup`'s.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax

from expandr_jax.data.triples import Triple
from expandr_jax.files.records import hash_json
from expandr_jax.objectives.contrastive import contrastive_setup
from expandr_jax.objectives.contrastive_checks import (
    check_contrastive_batch,
    check_contrastive_examples,
)
from expandr_jax.objectives.contrastive_steps import ContrastiveBatches
from expandr_jax.objectives.llm_ql import Corruption, corruption_of
from expandr_jax.objectives.packed_examples import ExampleHashes, triple_blocks, triples_key
from expandr_jax.objectives.settings import ContrastiveSettings
from expandr_jax.objectives.stored_examples import made_ahead, store_examples
from expandr_jax.objectives.trained import (
    divided,
    drops_out,
    joined,
    split_temperature,
    with_temperature,
)
from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents, TrainingLog
from expandr_jax.sharding import device_put, rows_here, whole
from expandr_jax.training.flops import row_flops
from expandr_jax.training.setup import count_updates, section_optimizer
from expandr_jax.training.stage import on_devices, train_stage
from expandr_jax.vectors.encoder import Kind


@dataclasses.dataclass(frozen=True)
class ContrastiveRound:
    """What a retriever learns in a round of step A, and by which steps.

    Attributes:
        triples: Training queries with their documents and expansions.
        ids: What messages call them.
        samples: Expansions a query; 0 trains on plain queries.
        kind: How expansions are read.
        settings: How it is trained.
        seed: That of all draws.
        number: The round's, counted from 0.
        fixed_updates: How often the retriever is updated; None: as often as `settings.epochs`
            passes over the triples take.
    """

    triples: Sequence[Triple]
    ids: Sequence[str]
    samples: int
    kind: Kind
    settings: ContrastiveSettings
    seed: int
    number: int
    fixed_updates: int | None = None

    @property
    def updates(self) -> int:
        """How often the retriever is updated."""
        if self.fixed_updates is not None:
            return self.fixed_updates
        return count_updates(self.settings, len(self.triples) // self.settings.batch_size)

    @property
    def steps(self) -> range:
        """Numbers of its steps among those of all rounds, micro-batches counted."""
        count = self.updates * self.settings.accumulation
        return range(self.number * count, (self.number + 1) * count)

    def identity(self, models: RetrieverModel, log: TrainingLog) -> dict[str, Any]:
        """What its checkpoints belong to; all processes read the texts together."""
        with log.reporter.progress("training texts read", len(self.triples)) as advance:
            texts = triples_key(self.triples, self.kind, advance, log.processes)
        return {
            "model": models.retriever_hash,
            "settings": hash_json(identity_of("contrastive", self.settings)),
            "texts": texts,
            "retriever": models.retriever.identity,
            "steps": len(self.steps),
        }


@dataclasses.dataclass(frozen=True)
class RoundExamples:
    """A round's examples, made when they are first asked for: where all steps are done, never.

    Attributes:
        own: What is learned.
        models: The retriever, whose tokenizer is used.
        corruption: What becomes of documents whose queries are foretold; None: none are.
        log: Shows what is made, and tells what is cut.
        hashes: Those of the examples that are made.
    """

    own: ContrastiveRound
    models: RetrieverModel
    corruption: Corruption | None
    log: TrainingLog
    hashes: ExampleHashes = dataclasses.field(default_factory=ExampleHashes)

    @functools.cached_property
    def batches(self) -> ContrastiveBatches:
        """The batches; all processes tokenize the texts together.

        Raises:
            UserError: A setting does not fit the examples.
        """
        own, retriever, cut = self.own, self.models.retriever, Counter[str]()
        reporter, processes = self.log.reporter, self.log.processes
        with reporter.progress("examples made", len(own.triples)) as advance:
            made = triple_blocks(
                own.triples, self.models.encoder, own.kind, advance, processes, cut
            )
            examples = store_examples(self.hashes.passing(made))
        if told := ", ".join(f"{count} {name}" for name, count in cut.items() if count):
            reporter.say(f"{told} are longer than the retriever reads, and lose their end")
        check_contrastive_examples(own.settings, examples, own.samples, own.ids)
        return ContrastiveBatches(
            examples,
            own.settings,
            own.samples,
            own.seed,
            retriever.tokenizer.pad_token_id,
            retriever.max_length,
            own.steps,
            self.corruption,
        )

    def older_identity(self) -> dict[str, str]:
        """What checkpoints told the examples by that have no hash of their texts."""
        examples = self.batches.examples
        told = {"examples": self.hashes.older, "all": self.hashes.all}
        if self.own.settings.curriculum:
            told["ease"] = hash_json([example.ease for example in examples])
        return told


def train_contrastive(
    stage: TrainedStage,
    models: RetrieverModel,
    params: Any,
    own: ContrastiveRound,
    workers: int = 0,
    evaluate: Callable[[Any], float] | None = None,
) -> Any:
    """A retriever's parameters after a round of step A, as each process can read them all.

    Args:
        stage: Where it is recorded and kept.
        models: The retriever's module and mesh.
        params: Weights to start from.
        own: What is learned.
        workers: Processes that make batches ahead; 0: none do.
        evaluate: Weights to a dev measure, called every `eval_every` updates and at the end, whose
            best weights are returned; None trains all steps.

    Raises:
        UserError: A setting does not fit the examples or the mesh, or training diverges.
    """
    settings, log = own.settings, stage.log
    mesh, retriever = models.contrastive_mesh, models.retriever
    check_contrastive_batch(settings, retriever, params, mesh, len(own.triples))
    corruption, steps = corruption_of(retriever, settings), own.steps
    examples = RoundExamples(own, models, corruption, log)
    rows = rows_here(mesh, settings.batch_size)
    optimizer = section_optimizer(settings, own.updates)
    setup = contrastive_setup(mesh, retriever, params, settings, optimizer)
    held, trained = divided(retriever, params, own.seed)
    frozen = device_put(held, setup.frozen)
    start = device_put(with_temperature(trained, settings), setup.shardings.params)
    key = None
    if drops_out(retriever, settings):
        key = jax.random.fold_in(jax.random.key(own.seed), own.number)
    flops = row_flops(retriever.module, params, bool(held))
    identity = own.identity(models, log)

    def batch(step: int) -> tuple[dict[str, Any], Contents]:
        arrays, tokens = make(steps[step])
        contents = examples.batches.contents(steps[step], len(rows), tokens, own.ids, flops)
        return arrays, contents

    with made_ahead(lambda: examples.batches, rows, workers) as make:
        trained = train_stage(
            stage,
            setup,
            start,
            on_devices(log.processes, batch, mesh, rows, settings.batch_size),
            identity=identity,
            older=examples.older_identity,
            prepare=lambda: examples.batches,
            settings=settings,
            steps=len(steps),
            first=steps.start,
            frozen=frozen,
            key=key,
            weights=lambda trained: split_temperature(trained, settings)[0],
            evaluate=evaluate and (lambda trained: evaluate(joined(held, trained))),
            patience=settings.patience,
        )
        return joined(held, whole(trained))
