"""A round in which the adapter learns of examples: which each step has, and how they are learned.

Batches are `adapter.AdapterBatches`'s; what it learns is an `Objective`.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.data.batches import batch_indices
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.adapter import AdapterBatches, adapter_setup, hold_out, make_examples
from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.packing import Example, hash_response_examples
from expandr_jax.objectives.settings import DpoSettings
from expandr_jax.pair import GeneratorModel
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import batch_divisor, whole
from expandr_jax.training.early_stopping import watch_dev
from expandr_jax.training.flops import FROZEN, forward_flops
from expandr_jax.training.setup import check_batch_size, count_updates, section_optimizer
from expandr_jax.training.stage import stage_trainer

# (batches, examples, what is done) to `AdapterBatches.reference` of these examples.
Reference = Callable[[AdapterBatches, Sequence[Example], str], np.ndarray]


@dataclasses.dataclass(frozen=True)
class AdapterRound:
    """What an adapter learns in a round, and by which steps.

    Attributes:
        objective: What is learned.
        section: What the config calls the settings.
        settings: How it is learned.
        rows, dev_rows: What it is learned of, and what is held out, as the objective reads them.
        count, dev_count: How many examples are made of each.
        texts: sha256 over all that they are made of.
        batch_size: Examples of a step.
        seed: That of all draws.
        number: The round's, counted from 0.
        make: Makes the examples of `dev_rows` and of `rows`.
    """

    objective: Objective
    section: str
    settings: DpoSettings
    rows: Sequence[Any]
    dev_rows: Sequence[Any]
    count: int
    dev_count: int
    texts: str
    batch_size: int
    seed: int
    number: int
    make: Callable[[Sequence[Any], Sequence[Any]], tuple[Sequence[Example], Sequence[Example]]]

    @functools.cached_property
    def _made(self) -> tuple[Sequence[Example], Sequence[Example]]:
        made = self.make(self.dev_rows, self.rows)
        if (*map(len, made),) != (self.dev_count, self.count):
            raise ValueError(
                f"{self.objective.name}: makes another number of examples than it says"
            )
        return made

    @property
    def examples(self) -> Sequence[Example]:
        """What it is learned of; the texts are tokenized when this or `dev` is first asked for."""
        return self._made[1]

    @property
    def dev(self) -> Sequence[Example]:
        """What is held out."""
        return self._made[0]

    @property
    def updates(self) -> int:
        """How often the adapter is updated."""
        return count_updates(self.settings, self.count // self.batch_size)

    @property
    def steps(self) -> int:
        """Its steps, micro-batches counted."""
        return self.updates * self.settings.accumulation

    def drawn(self, step: int) -> np.ndarray:
        """Which examples a step has: [batch_size] indices."""
        number = self.number * self.steps + step
        return batch_indices(self.seed, number, self.count, self.batch_size)

    def contents(self, indices: Sequence[int], flops: Callable[[int, int], int]) -> Contents:
        """What a step of these examples is made of; `flops` is of a row's size."""
        taken = [self.examples[i] for i in indices]
        return Contents(
            [example.name for example in taken],
            sum(example.tokens for example in taken),
            sum(flops(*example.size) for example in taken),
        )

    def identity(self, model: GeneratorModel) -> dict[str, Any]:
        """What its checkpoints belong to."""
        lora = model.generator.module.lora
        settings = identity_of(self.section, self.settings) | {"loss": self.objective.name}
        return {
            "model": model.generator_hash,
            "settings": hash_json(settings),
            "lora": hash_json([lora.rank, lora.alpha, lora.dropout, list(lora.targets)]),
            "steps": self.steps,
            "generator": model.generator.identity,
            "texts": self.texts,
        }

    def older(self) -> dict[str, str]:
        """What checkpoints told the examples by that have no hash of their texts."""
        return {"examples": hash_response_examples(itertools.chain(self.examples, self.dev))}


def adapter_round(
    objective: Objective,
    section: str,
    settings: DpoSettings,
    model: GeneratorModel,
    rows: Sequence[Any],
    seed: int,
    number: int,
    reporter: Reporter,
    processes: Processes | None = None,
) -> AdapterRound:
    """Makes a round of the rows that its objective reads; the rest is as of `AdapterRound`.

    Its examples are made by all `processes` together, when one is first asked for; None: by this
    one, alone.

    Raises:
        UserError: There are too few rows for the mesh, or it cannot divide a batch.
    """
    devices = batch_divisor(model.dpo_mesh)
    check_batch_size(f"{section}.batch_size", settings.batch_size, model.dpo_mesh)
    parts = hold_out(rows, settings.dev_share, objective.prompt)
    counts: list[int] = []
    digest = hashlib.sha256()
    with reporter.progress("training texts read", len(rows)) as advance:
        for part in parts:
            counts.append(0)
            for row in part:
                digest.update(hash_json(objective.texts(row)).encode())
                counts[-1] += objective.count(row, settings)
                advance(1)
    batch_size = min(settings.batch_size, counts[1] // devices * devices)
    if not batch_size:
        raise UserError(
            f"{counts[1]} {objective.examples} to train the generator on; expected {devices} "
            "or more"
        )
    return AdapterRound(
        objective=objective,
        section=section,
        settings=settings,
        rows=parts[1],
        dev_rows=parts[0],
        count=counts[1],
        dev_count=counts[0],
        texts=digest.hexdigest(),
        batch_size=batch_size,
        seed=seed,
        number=number,
        make=lambda *parts: make_examples(
            objective, model.generator, *parts, settings, reporter, processes
        ),
    )


@dataclasses.dataclass(frozen=True)
class AdapterTrainer:
    """Trains an adapter in a round.

    Attributes:
        train: So many steps to the adapter after them, on its devices, as `stage_trainer` has it.
        evaluate: An adapter to the mean metrics of the examples that are held out.
    """

    train: Callable[[int], Any]
    evaluate: Callable[[Any], dict[str, float]]


def adapter_trainer(
    stage: TrainedStage,
    model: GeneratorModel,
    own: AdapterRound,
    adapter: Any | None,
    reference_of: Reference,
) -> AdapterTrainer:
    """Compiles a round's step; what its batches have of the reference is made before the first.

    Args:
        stage: Where it is recorded and kept.
        model: The generator and its mesh.
        own: What is learned.
        adapter: The one to start from; None starts a new one.
        reference_of: Makes the reference's log-probabilities, where the objective needs them.
    """
    objective, settings, module = own.objective, own.settings, model.generator.module
    params, key = model.generator_params, jax.random.key(own.seed)
    start = adapter if settings.reference == "start" else None
    batches = AdapterBatches(model, objective, settings, own.batch_size, start)

    @functools.cache  # Where all steps are done, no text is tokenized.
    def references() -> tuple[np.ndarray | None, np.ndarray | None]:
        batches.choose_sizes(own.examples, map(own.drawn, range(own.steps)))
        if not objective.reference:
            return None, None
        reference = reference_of(batches, own.examples, "reference log-probabilities")
        if not own.dev:
            return reference, None
        return reference, reference_of(batches, own.dev, "reference on dev pairs")

    @functools.cache
    def flops(tokens: int, logits: int) -> int:
        return FROZEN * forward_flops(module, params, 1, tokens, logits=logits)

    def batch(step: int) -> tuple[dict[str, Any], Contents]:
        indices = own.drawn(step)
        packed = batches.pack(own.examples, indices, references()[0])
        return packed, own.contents(indices, flops)

    train = stage_trainer(
        stage,
        adapter_setup(model, objective, settings, section_optimizer(settings, own.updates)),
        init_lora(key, params, module.lora) if adapter is None else adapter,
        batch,
        identity=own.identity(model),
        older=own.older,
        prepare=references,
        settings=settings,
        steps=own.steps,
        frozen=[params],
        key=jax.random.fold_in(key, own.number),
    )

    return AdapterTrainer(
        train, lambda adapter: batches.evaluate(adapter, own.dev, references()[1])
    )


def lowest_loss_on_dev(
    stage: TrainedStage,
    own: AdapterRound,
    trainer: AdapterTrainer,
    journal: CommonJournal,
    keep: Callable[[Any], None],
) -> dict[str, float]:
    """The step whose adapter has the lowest loss on what is held out, and its metrics there.

    All steps are trained; `journal` is as of `watch_dev`. `keep` takes each adapter whose loss is
    the lowest so far, as each process can read it all.
    """
    every = own.settings.eval_every * own.settings.accumulation or own.steps
    return watch_dev(
        stage.log,
        journal,
        trainer.train,
        trainer.evaluate,
        lambda _, adapter: keep(whole(adapter)),
        stops=[*range(every, own.steps, every), own.steps],
        score=lambda metrics: -metrics["loss"],
    )
