"""The adapter's batches on the mesh, and what becomes of the examples that are held out."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from expandr_jax.errors import NotFiniteError
from expandr_jax.files.records import hash_json
from expandr_jax.files.stored_rows import Picked
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.log_probs import response_log_probs
from expandr_jax.objectives.objective import (
    Objective,
    ObjectiveSettings,
    adapter_losses,
    adapter_step,
)
from expandr_jax.objectives.packing import Example, RowSize, hash_response_examples, pack, row_sizes
from expandr_jax.objectives.settings import DpoSettings
from expandr_jax.pair import GeneratorModel, adapter_shapes
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.sharding import batch_sharding, device_put, on_mesh, replicated, whole
from expandr_jax.training.setup import Program, TrainingSetup, set_up
from expandr_jax.weights.trees import hash_tree

MOST_SIZES = 6  # Different sizes of rows in a training.
STEPS_PER_SIZE = 40  # A size is a program to compile, for as long as a few steps take.


def hold_out(
    rows: Sequence[Any], share: float, prompt: Callable[[Any], Any]
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Divides what an objective reads into dev and training rows, each in their order.

    They come sorted by query, so the first ones are of one kind: of one package, one source. The
    sha256 of the prompts is not, and holds out all rows of one prompt, as far as the number goes.
    """
    keys = np.fromiter((hash_json(prompt(row)) for row in rows), "S64", len(rows))
    drawn, count = np.argsort(keys, kind="stable"), int(len(rows) * share)
    return Picked(rows, np.sort(drawn[:count])), Picked(rows, np.sort(drawn[count:]))


def make_examples(
    objective: Objective,
    generator: Generator,
    held_out: Sequence[Any],
    rows: Sequence[Any],
    settings: DpoSettings,
    reporter: Reporter,
    processes: Processes | None = None,
) -> tuple[Sequence[Example], Sequence[Example]]:
    """Examples of the rows that are held out, and of the others, as `hold_out` divides them.

    All processes call it together; None: this one is alone. The reporter says how many texts were
    cut, and what is longer than the model was made for.
    """
    with reporter.progress("training texts tokenized", len(held_out) + len(rows)) as advance:
        (dev, dev_cut), (others, cut) = (
            objective.tokenize(generator, part, settings, processes, advance)
            for part in (held_out, rows)
        )
    if dev_cut + cut:
        reporter.say(f"{dev_cut + cut} prompts or responses were cut to their limits")
    longest = max((example.positions for example in itertools.chain(dev, others)), default=0)
    if longest > generator.module.config.max_positions:
        reporter.say(
            f"a prompt and a response have up to {longest} tokens together; the generator was "
            f"made for {generator.module.config.max_positions}"
        )
    return dev, others


def adapter_setup(
    model: GeneratorModel,
    objective: Objective,
    settings: ObjectiveSettings,
    optimizer: optax.GradientTransformation,
) -> TrainingSetup:
    """`adapter_step` on the model's mesh: (state, params, batch, key) -> (state, metrics)."""
    module = model.generator.module
    step = functools.partial(adapter_step, objective=objective, module=module, settings=settings)
    shapes = adapter_shapes(module, model.generator_params)
    shardings = model.adapter_shardings
    return set_up(model.dpo_mesh, step, shapes, shardings, optimizer, model.base_shardings)


class AdapterBatches:
    """Packed batches of an objective's examples, on the mesh, and what the models make of them.

    All batches have `batch_size` examples. The model's parameters may be shapes with shardings.

    Attributes:
        sizes: What rows are padded to; see `choose_sizes`.
        log_probs: (the reference's variables, batch) -> what `response_log_probs` gives, on every
            device.
        losses: (adapter, base, batch) -> `adapter_losses`, without dropout, likewise.
    """

    def __init__(
        self,
        model: GeneratorModel,
        objective: Objective,
        settings: ObjectiveSettings,
        batch_size: int,
        start: Any | None = None,
    ):
        """Makes the programs; `start` is the adapter of the reference, None for the base alone."""
        self._model, self._objective, self._batch_size = model, objective, batch_size
        self._reference = {"params": model.generator_params}
        self._start = start
        of_reference = {"params": model.base_shardings}
        if start is not None:
            of_reference["lora"] = model.adapter_shardings
            self._reference["lora"] = device_put(start, of_reference["lora"])
        self.sizes: list[RowSize] = []
        module, base = model.generator.module, model.base_shardings
        self._sharding = batch_sharding(model.dpo_mesh)

        log_probs = functools.partial(
            response_log_probs, module, responses=objective.responses, chunk=settings.chunk
        )
        losses = functools.partial(
            adapter_losses, objective=objective, module=module, settings=settings
        )

        def program(function: Callable[..., Any], *shardings: Any) -> Program:
            return jax.jit(
                on_mesh(model.dpo_mesh, function),
                in_shardings=(*shardings, self._sharding),
                out_shardings=replicated(model.dpo_mesh),
            )

        self.log_probs = program(log_probs, of_reference)
        self.losses = program(losses, model.adapter_shardings, base)

    def choose_sizes(self, examples: Sequence[Example], steps: Iterable[Sequence[int]]) -> None:
        """Sets `sizes` to what suits the batches of a training, given the examples of each step."""
        made = np.array([example.size for example in examples])
        needed = [tuple(made[indices].max(axis=0).tolist()) for indices in steps]
        self.sizes = row_sizes(needed, min(MOST_SIZES, 1 + len(needed) // STEPS_PER_SIZE))

    def pack(
        self, examples: Sequence[Example], indices: Sequence[int], reference: np.ndarray | None
    ) -> dict[str, Any]:
        """The batch of the examples at `indices`, with what the reference thinks of them."""
        batch = pack([examples[i] for i in indices], self._model.generator.pad_id, self.sizes)
        if reference is not None:
            batch["reference"] = reference[indices]
        return device_put(batch, self._sharding)

    def reference_identity(self, examples: Sequence[Example]) -> str:
        """A hash of all that `reference` depends on: the examples, the base and its adapter."""
        model = self._model
        of = model.generator_hash, model.generator.identity, hash_response_examples(examples)
        return hash_json(of if self._start is None else [*of, hash_tree(self._start)])

    def reference(
        self, examples: Sequence[Example], advance: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """Summed log-probabilities under the reference: [examples, responses] float32.

        Raises:
            NotFiniteError: One of them is not finite, naming its example.
        """
        result = np.zeros((len(examples), self._objective.responses), np.float32)
        # Examples of like length share a batch.
        order = sorted(range(len(examples)), key=lambda i: examples[i].tokens)
        for indices, filled in self._filled(order):
            sums, _ = self.log_probs(self._reference, self.pack(examples, filled, None))
            found = result[indices] = whole(sums)[: len(indices)]
            if len(bad := np.flatnonzero(~np.isfinite(found).all(axis=1))):
                raise NotFiniteError(
                    f"{examples[indices[bad[0]]].name}: the log-probability of the reference is "
                    "not finite, before any training: the generator's weights are damaged, or "
                    "generator.compute_dtype is too narrow for them"
                )
            advance(len(indices))
        return result

    def evaluate(
        self, adapter: Any, examples: Sequence[Example], reference: np.ndarray | None
    ) -> dict[str, float]:
        """Mean loss, accuracy, margin and so on of held-out examples, without dropout."""
        totals: dict[str, float] = {}
        for indices, filled in self._filled(range(len(examples))):
            batch = self.pack(examples, filled, reference)
            losses, metrics = self.losses(adapter, self._model.generator_params, batch)
            for name, column in {"loss": losses, **metrics}.items():
                total = float(np.sum(np.asarray(column)[: len(indices)]))
                totals[name] = totals.get(name, 0.0) + total
        return {name: total / len(examples) for name, total in totals.items()}

    def _filled(self, order: Sequence[int]) -> list[tuple[list[int], list[int]]]:
        """Batches; the last is filled with its first example, to be left out of results."""
        parts = [
            list(order[start : start + self._batch_size])
            for start in range(0, len(order), self._batch_size)
        ]
        return [(part, part + part[:1] * (self._batch_size - len(part))) for part in parts]


def kept_reference(
    checksums: Checksums,
    reporter: Reporter,
    batches: AdapterBatches,
    examples: Sequence[Example],
    task: str,
) -> np.ndarray:
    """`AdapterBatches.reference`, made once for the same examples and weights, as `task`.

    It is kept in work/reference-HASH.npy of the checksums' workdir.
    """

    def make() -> np.ndarray:
        with reporter.progress(task, len(examples)) as advance:
            return batches.reference(examples, advance)

    name = f"work/reference-{batches.reference_identity(examples)[:16]}.npy"
    return np.load(checksums.array(name, make), allow_pickle=False)
