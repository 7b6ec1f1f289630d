"""What an objective of step B is, and the step that trains the generator's adapter by one."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from expandr_jax.losses.preference import PreferenceSettings
from expandr_jax.models.decoder import Decoder
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.log_probs import packed_log_probs
from expandr_jax.objectives.packing import Example
from expandr_jax.objectives.stored_responses import ResponseBlock, StoredResponses, pack_responses
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.shares import shares_in_turn
from expandr_jax.settings import NotNegative, Positive, count
from expandr_jax.training.train_state import TrainState

ROWS_AT_ONCE = 256  # Whose token ids processes hand each other together.
Losses = tuple[jax.Array, dict[str, jax.Array]]  # [batch] losses, and metrics, [batch] each.


@dataclasses.dataclass(frozen=True)
class ObjectiveSettings(PreferenceSettings):
    """What objectives can be set to; each reads what it needs. A config's section `dpo` is one."""

    length_normalized: bool = False
    sft_weight: NotNegative = 0.0
    reward_temperature: Positive = 0.5
    chunk: Annotated[int, count(1)] = 256


@dataclasses.dataclass(frozen=True)
class Objective:
    """How the generator learns from what was sampled and rewarded.

    Attributes:
        name: What is learned, by which checkpoints are known.
        rows: What the rows of its files are called.
        examples: What it makes of them is called.
        file: Name of the file of a round that it learns from.
        read: (path, generator, the config's sections `dpo` and `expansion`, its `reward.threshold`,
            own) -> rows of such a file, and how many were left out for what reason. `own`: the file
            is one that a run has written, which has no bad lines and whose prompts may be cut.
        tokenizer: (generator, all rows, the config's section `dpo`) -> a function of a row's number
            and the row to its examples, and to how many texts had to be cut to the limits.
        prompt: A row to its prompt.
        texts: A row to all that its examples are made of, as a value of JSON.
        count: (a row, the config's section `dpo`) -> how many examples that makes of it.
        responses: Responses of an example at most.
        reference: The losses need the base's log-probabilities: "reference" [batch, responses] in
            the batch.
        losses: (the policy's log-probabilities [batch, response tokens], a batch from `pack`,
            settings) -> losses and metrics.
        extras: Names of the numbers that the losses need of each example.
    """

    name: str
    rows: str
    examples: str
    file: str
    read: Callable[..., tuple[Sequence[Any], dict[str, int]]]
    tokenizer: Callable[..., Callable[[int, Any], tuple[Sequence[Example], int]]]
    prompt: Callable[[Any], Any]
    texts: Callable[[Any], Any]
    responses: int
    reference: bool
    losses: Callable[[jax.Array, Mapping[str, jax.Array], ObjectiveSettings], Losses]
    extras: tuple[str, ...] = ()
    count: Callable[[Any, Any], int] = lambda row, settings: 1

    def tokenize(
        self,
        generator: Generator,
        rows: Sequence[Any],
        settings: Any,
        processes: Processes | None = None,
        progress: Callable[[int], None] = lambda count: None,
    ) -> tuple[Sequence[Example], int]:
        """Examples of rows, in their order, and how many texts were cut.

        All processes call it together, and each tokenizes a share.

        Args:
            generator: Its tokenizer is used.
            rows: As `read` has them.
            settings: The config's section `dpo`.
            processes: Those of the run; None: this one is alone.
            progress: Told of how many rows more are done, by all processes.
        """
        make, cut = self.tokenizer(generator, rows, settings), 0
        processes = processes or Processes()

        def blocks() -> Iterator[ResponseBlock]:
            nonlocal cut
            for first, own, every in shares_in_turn(rows, ROWS_AT_ONCE, processes):
                made = [make(number, row) for number, row in enumerate(own, first)]
                block = pack_responses([example for examples, _ in made for example in examples])
                lost = np.array(sum(were_cut for _, were_cut in made))
                for part in processes.exchange(block | {"cut": lost}):
                    cut += int(part["cut"])
                    yield part
                progress(every)

        return StoredResponses(blocks(), self.extras), cut

    def counted(self, rows: int, dropped: Mapping[str, int]) -> str:
        """What there is to learn from, and what was left out, for people."""
        reasons = "".join(f"; {count} dropped: {why}" for why, count in sorted(dropped.items()))
        return f"{rows} {self.rows}{reasons}"


def adapter_losses(
    adapter: Any,
    params: Any,
    batch: Mapping[str, jax.Array],
    *,
    objective: Objective,
    module: Decoder,
    settings: ObjectiveSettings,
    dropout_key: jax.Array | None = None,
) -> Losses:
    """An objective's losses and metrics of each row of a packed batch.

    Args:
        adapter: The trainable LoRA tree.
        params: The frozen base.
        batch: From `packing.pack`, with "reference" where the objective needs it.
        objective, module, settings: What is learned, by which decoder, and how.
        dropout_key: Turns the adapter's dropout on.
    """
    log_probs = packed_log_probs(
        module,
        {"params": params, "lora": adapter},
        batch,
        responses=objective.responses,
        chunk=settings.chunk,
        dropout_key=dropout_key,
    )
    return objective.losses(log_probs, batch, settings)


def adapter_loss(*args: Any, **kwargs: Any) -> Losses:
    """Means over the batch of `adapter_losses`, with its arguments."""
    losses, metrics = adapter_losses(*args, **kwargs)
    return jnp.mean(losses), {name: jnp.mean(value) for name, value in metrics.items()}


def adapter_step(
    state: TrainState,
    params: Any,
    batch: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    **settings: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One batch's part in an update of the adapter: the state after it, and mean metrics.

    Dropout is drawn from (key, step); other arguments are those of `adapter_losses`.
    """
    loss_of = jax.value_and_grad(functools.partial(adapter_loss, **settings), has_aux=True)
    key = jax.random.fold_in(key, state.step)
    (loss, metrics), grads = loss_of(state.params, params, batch, dropout_key=key)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), **metrics}
    return state.apply(grads, optimizer), metrics
