"""Preference pairs as batches on the mesh, and what becomes of those held out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from expandr_jax.data.records import hash_json
from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.preference import (
    PreferencePair,
    Shape,
    batch_shapes,
    dpo_values,
    pack,
)
from expandr_jax.pair import GeneratorModel
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import batch_sharding, put, whole
from expandr_jax.training.steps import reference_program, values_program
from expandr_jax.weights.adapter import base_name, export_adapter, load_adapter

MOST_SHAPES = 6  # Of a training's batches.
STEPS_PER_SHAPE = 40  # A shape is a program to compile, for as long as a few steps take.


def tokenize_pairs(
    generator: Generator,
    rows: Sequence[dict[str, Any]],
    *,
    prompt_length: int,
    response_length: int,
) -> tuple[list[PreferencePair], int]:
    """Preference rows to ids: the end of the prompt, the start of each response, one EOS on each.

    Args:
        generator: For its tokenizer and its end of an answer.
        rows: {"prompt", "chosen", "rejected"}, the prompt with the chat template applied.
        prompt_length: Most tokens of a prompt.
        response_length: Most tokens of a response, EOS included.

    Returns:
        The pairs, and how many texts had to be cut.
    """
    pairs, cut = [], 0
    for number, row in enumerate(rows):
        texts = [row[name] for name in ("prompt", "chosen", "rejected")]
        ids = generator.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        prompt = ids[0][-prompt_length:]
        made = [generator.response_ids(part, response_length) for part in ids[1:]]
        responses, were_cut = zip(*made, strict=True)
        cut += (len(ids[0]) > prompt_length) + sum(were_cut)
        pairs.append(PreferencePair(prompt, *responses, name=str(row.get("query_id", number))))
    return pairs, cut


class PairBatches:
    """Packed batches of preference pairs, on the mesh, and what the models make of them.

    Args:
        run: Where the base's log-probabilities are kept, and progress goes.
        models: The generator and mesh.
        batch_size: Pairs of every batch.
        settings: Of the loss.

    Attributes:
        values: The objective: an adapter, a base and a batch to losses and figures.
        examples: What they are called in messages.
        shapes: That batches are padded to; see `choose_shapes`.
    """

    values = staticmethod(dpo_values)
    examples = "preference pairs"

    def __init__(self, run: Run, models: GeneratorModel, batch_size: int, settings: Any):
        self.run, self.models, self.batch_size = run, models, batch_size
        self.settings = settings
        self.shapes: list[Shape] = []
        mesh, module, base = models.dpo_mesh, models.generator.module, models.base_shardings
        self.sharding = batch_sharding(mesh)
        self._log_probs = reference_program(mesh, base, module=module, chunk=settings.chunk)
        self._values = values_program(
            mesh,
            models.adapter_shardings,
            base,
            values=self.values,
            module=module,
            config=settings,
        )

    def choose_shapes(self, pairs: Sequence[Any], parts: Sequence[Sequence[int]]) -> None:
        """Sets `shapes` to what suits the batches of a training, each the places of its pairs."""
        needed = []
        for part in parts:
            lengths, responses = zip(*(pairs[i].size for i in part), strict=True)
            needed.append((max(lengths), max(responses)))
        self.shapes = batch_shapes(needed, min(MOST_SHAPES, 1 + len(parts) // STEPS_PER_SHAPE))

    def pack(
        self, pairs: Sequence[PreferencePair], chosen: Sequence[int], reference: np.ndarray
    ) -> dict[str, Any]:
        """The batch of the pairs `chosen`, with the reference's log-probabilities."""
        batch = pack([pairs[i] for i in chosen], self.models.generator.pad_id, self.shapes)
        batch["reference_chosen"], batch["reference_rejected"] = reference[chosen].T
        return put(batch, self.sharding)

    def reference(self, pairs: Sequence[PreferencePair], task: str) -> np.ndarray:
        """Log-probabilities of both responses under the base, adapter off: [pairs, 2] float32.

        They are kept beside the pairs and used again only for the same pairs and weights.
        """
        identity = hash_json([self.models.generator_hash, [_ids(p) for p in pairs]])
        name = f"work/reference-{identity[:16]}.npy"
        path = self.run.path(name)
        if self.run.seals.intact(name):
            return np.load(path, allow_pickle=False)
        result = np.zeros((len(pairs), 2), np.float32)
        variables = {"params": self.models.generator_params}
        with self.run.progress(task, len(pairs)) as advance:
            # Pairs of like length share a batch.
            order = sorted(range(len(pairs)), key=lambda i: sum(map(len, _ids(pairs[i]))))
            for chosen, filled in self._filled(order):
                batch = pack([pairs[i] for i in filled], self.models.generator.pad_id, self.shapes)
                both = self._log_probs(variables, put(batch, self.sharding))[:2]
                result[chosen] = np.stack(whole(both), axis=1)[: len(chosen)]
                advance(len(chosen))

        def write() -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, result)
            temporary.replace(path)

        self.run.processes.once(write)
        self.run.seals.seal(name)
        return result

    def evaluate(
        self, adapter: Any, pairs: Sequence[PreferencePair], reference: np.ndarray
    ) -> dict[str, float]:
        """Mean loss, accuracy, margin and so on of held-out pairs, without dropout."""
        totals: dict[str, float] = {}
        for chosen, filled in self._filled(range(len(pairs))):
            batch = self.pack(pairs, filled, reference)
            losses, metrics = self._values(adapter, self.models.generator_params, batch)
            for name, values in {"loss": losses, **metrics}.items():
                total = float(np.sum(np.asarray(values)[: len(chosen)]))
                totals[name] = totals.get(name, 0.0) + total
        return {name: total / len(pairs) for name, total in totals.items()}

    def _filled(self, order: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Batches of pairs; the last is filled with its first pair, to be left out of results."""
        parts = [
            list(order[start : start + self.batch_size])
            for start in range(0, len(order), self.batch_size)
        ]
        return [(part, part + part[:1] * (self.batch_size - len(part))) for part in parts]


class DevPairs:
    """Figures on held-out pairs, and the adapter with the lowest loss on them.

    A restart evaluates no step twice, and comes to the same best adapter.

    Args:
        run: Where figures and adapter go: metrics.jsonl, work/round-R/generator-dev.jsonl and
            round-R/best-adapter.
        models: The generator.
        batches: Evaluates pairs.
        pairs: Those held out; with none, nothing is evaluated.
        round_: Counts from 0.
    """

    def __init__(
        self,
        run: Run,
        models: GeneratorModel,
        batches: PairBatches,
        pairs: Sequence[PreferencePair],
        round_: int,
    ):
        self._run, self._batches, self._pairs, self._round = run, batches, pairs, round_
        self._module = models.generator.module
        path = run.path("work", f"round-{round_}", "generator-dev.jsonl")
        self._journal = CommonJournal(path, run.processes)
        self._name = f"round-{round_}/best-adapter"
        self._best = run.path(self._name)
        if pairs:
            self._reference = batches.reference(pairs, "reference on dev pairs")

    def steps_left(self, steps: int, every: int) -> list[int]:
        """Every so many steps and the last, but for those that were evaluated before a restart."""
        if not self._pairs:
            return []
        return [*range(every or steps, steps, every or steps), steps][len(self._journal.rows) :]

    def evaluate(self, step: int, adapter: Any) -> None:
        """Takes the adapter's figures after a step, and keeps it if none had a lower loss."""
        figures = self._batches.evaluate(adapter, self._pairs, self._reference)
        if not all(map(math.isfinite, figures.values())):
            raise NotFiniteError(
                f"generator, round {self._round}, step {step}: the loss on dev pairs is not "
                "finite; lower the learning rate"
            )
        if all(figures["loss"] < row["loss"] for row in self._journal.rows):
            best = whole(adapter)
            self._run.processes.once(lambda: self._keep(best))
            self._run.seals.seal(self._name)
        self._run.metrics.rewind("generator-dev", self._round, step)
        self._run.metrics.write("generator-dev", self._round, step, figures)
        # Last, so that a kill before it has all of this done again.
        self._journal.append([{"step": step, **figures}])
        shown = [
            f"{name} {figures[name]:.4f}" for name in ("accuracy", "margin") if name in figures
        ]
        loss = f"dev loss {figures['loss']:.4f}"
        self._run.console.print(f"  step {step}: {', '.join([loss, *shown])}")

    def _keep(self, adapter: Any) -> None:
        base = base_name(self._run.address, self._run.config.generator.source)
        export_adapter(self._best, adapter, self._module.lora, self._module.config, base)

    def best(self) -> Any | None:
        """The adapter with the lowest loss; None where no pairs are held out.

        Raises:
            UserError: It is damaged.
        """
        if not self._pairs:
            return None
        if not self._run.seals.intact(self._name):
            self._journal.keep(0)
            checkpoints = f"generator-{self._round}" if self._round else "generator"
            raise UserError(
                f"{self._best}: was damaged; remove {self._run.path('checkpoints', checkpoints)}, "
                "and the same command trains it again"
            )
        if not self._journal.finished:
            self._journal.finish()
        best = min(self._journal.rows, key=lambda row: row["loss"])
        self._run.console.print(
            f"  lowest dev loss {best['loss']:.4f}, of step {best['step']}: {self._best}"
        )
        return load_adapter(str(self._best), self._module.config)[1]


def _ids(pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
    """A pair's ids as plain lists."""
    return list(pair.prompt), list(pair.chosen), list(pair.rejected)
