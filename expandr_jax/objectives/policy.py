"""On-policy training of the adapter: groups as rows of a batch, and the steps that learn of them.

A row holds a prompt once and all of its sampled texts, so that the prompt is computed once for all.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from expandr_jax.errors import UserError
from expandr_jax.losses.policy import (
    POLICY_LOSSES,
    PolicyLoss,
    advantages,
    k3,
    policy_losses,
    token_weights,
)
from expandr_jax.models.decoder import Decoder
from expandr_jax.objectives.log_probs import sampled_log_probs
from expandr_jax.objectives.packing import Example, RowSize, pack
from expandr_jax.objectives.settings import GrpoSettings
from expandr_jax.pair import GeneratorModel, adapter_shapes
from expandr_jax.rewards.group import Group
from expandr_jax.sharding import batch_divisor, batch_sharding, device_put, on_mesh, whole
from expandr_jax.training.setup import Program, TrainingSetup, set_up
from expandr_jax.training.train_state import TrainState, make_optimizer

WIDTHS = 4  # Sizes of rows at most: a program to compile each.
KL_SHARE = 8  # One of so many rows tells the KL where nothing is learned of it.
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A group as it was sampled.

    Attributes:
        group: The query with its candidates, whose token ids and log-probabilities are there.
        prompt: The prompt's token ids.
        used: Whether anything is to be learned of it.
    """

    group: Group
    prompt: Sequence[int]
    used: bool = True


def row_sizes_of(longest_prompt: int, candidates: int, most_tokens: int) -> list[RowSize]:
    """Sizes of rows for prompts of up to so many tokens, in steps of the texts' longest length."""
    steps = [-(-candidates * most_tokens * step // WIDTHS) for step in range(1, WIDTHS + 1)]
    widths = [-(-width // 16) * 16 for width in steps]
    return [(longest_prompt + width, width) for width in widths]


def policy_optimizer(settings: GrpoSettings) -> optax.GradientTransformation:
    """The optimizer of a round, by the config's section `grpo`."""
    return make_optimizer(
        settings.learning_rate,
        settings.steps * settings.updates,
        warmup=settings.warmup_steps,
        clip_norm=settings.clip_norm,
        accumulation=settings.accumulation,
        constant=True,
    )


def micro_rows(settings: GrpoSettings, section: str, mesh: Mesh) -> int:
    """Groups of a micro-batch, by the settings of a section of the config.

    Raises:
        UserError: The mesh cannot divide them.
    """
    parts, devices = settings.minibatches * settings.accumulation, batch_divisor(mesh)
    if settings.groups % (parts * devices):
        beside = f", times {1 + settings.documents} with documents," if settings.documents else ""
        raise UserError(
            f"{section}.queries {settings.queries}{beside} must be a multiple of "
            f"{parts * devices} ({section}.minibatches times {section}.accumulation times the "
            "mesh's data and fsdp)"
        )
    return settings.groups // parts


def kl_rows(rows: int, mesh: Mesh) -> int:
    """Rows of an update's that tell the KL where nothing is learned of it."""
    devices = batch_divisor(mesh)
    return max(1, rows // KL_SHARE // devices) * devices


def pack_sampled(
    rows: Sequence[Sampled],
    settings: GrpoSettings,
    pad_id: int,
    sizes: Sequence[RowSize],
) -> dict[str, np.ndarray]:
    """The batch of an update, on the host: `packing.pack`'s arrays and those of `policy_losses`.

    Args:
        rows: Groups with as many candidates each.
        settings: The config's section `grpo`.
        pad_id, sizes: As of `pack`.
    """
    loss = POLICY_LOSSES[settings.loss]
    candidates = [row.group.candidates for row in rows]
    batch = pack(
        [Example(row.prompt, [c.tokens for c in row.group.candidates]) for row in rows],
        pad_id,
        sizes,
    )
    rewards = np.array([[c.total for c in group] for group in candidates])
    lengths = np.array([[len(c.tokens) for c in group] for group in candidates])
    used = np.array([row.used for row in rows])
    counts = np.array([[row.group.weight] for row in rows])
    learned = np.broadcast_to(used[:, None], lengths.shape)
    if settings.mask_cut:
        learned = learned & [[c.finished != "length" for c in group] for group in candidates]
    every = np.ones_like(learned)
    of_response = {
        "advantages": counts * advantages(rewards, settings.advantage or loss.advantage),
        "weights": token_weights(lengths, learned, loss.reduction, settings.max_new_tokens, used),
        "means": token_weights(lengths, every, "batch", settings.max_new_tokens),
    }
    own = batch["responses"]
    for name, values in of_response.items():
        spread = np.take_along_axis(values, np.maximum(own - 1, 0), axis=1)
        batch[name] = np.where(own > 0, spread, 0.0).astype(np.float32)
    batch["sampled"] = np.zeros(own.shape, np.float32)
    for row, group in enumerate(candidates):
        known = np.concatenate([np.asarray(c.log_probs, np.float32) for c in group])
        batch["sampled"][row, : len(known)] = known
    return batch


def policy_step(
    state: TrainState,
    params: Any,
    batch: Mapping[str, jax.Array],
    rate: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
    module: Decoder,
    loss: PolicyLoss,
    settings: GrpoSettings,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One micro-batch's part in an update of the adapter: the state after it, and metrics.

    Metrics are means over tokens, and "largest_mismatch". Nothing is dropped out: the ratio of a
    policy to itself must be 1.

    Args:
        state, params: The adapter's state; the frozen base.
        batch: From `pack_sampled`, with "old" and "reference" where they are needed.
        rate: Scales the update; 1 is the learning rate as it is.
        optimizer, module, loss: How it is updated, by which decoder, what is learned.
        settings: The config's section `grpo`.
    """

    def of_adapter(adapter: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        log_probs, entropies = sampled_log_probs(
            module,
            {"params": params, "lora": adapter},
            batch,
            responses=settings.samples,
            chunk=settings.chunk,
            temperature=settings.temperature,
            learn_entropy=settings.entropy_weight > 0,
        )
        losses, metrics = policy_losses(
            log_probs, entropies, batch, loss=loss, settings=settings, count=settings.samples
        )
        largest = jnp.max(metrics.pop("largest_mismatch"))
        means = {name: jnp.mean(value) for name, value in metrics.items()}
        return jnp.mean(losses), {**means, "largest_mismatch": largest}

    (loss_, metrics), grads = jax.value_and_grad(of_adapter, has_aux=True)(state.params)
    metrics = {"loss": loss_, "grad_norm": optax.tree.norm(grads), **metrics}
    return state.apply(grads, optimizer, rate), metrics


class PolicyTrainer:
    """The programs of on-policy training on a model's mesh.

    Attributes:
        setup: `policy_step` on the mesh: (state, base, batch, rate) -> (state, metrics).
    """

    def __init__(
        self, model: GeneratorModel, settings: GrpoSettings, optimizer: optax.GradientTransformation
    ):
        """`settings` are the config's section `grpo`; parameters may be shapes."""
        module, self._params = model.generator.module, model.generator_params
        self._settings, self._mesh = settings, model.dpo_mesh
        shapes = adapter_shapes(module, model.generator_params)
        step = functools.partial(
            policy_step, module=module, loss=POLICY_LOSSES[settings.loss], settings=settings
        )
        base, adapter = model.base_shardings, model.adapter_shardings
        self.setup: TrainingSetup = set_up(model.dpo_mesh, step, shapes, adapter, optimizer, base)
        log_probs = functools.partial(
            _log_probs, module, settings.samples, settings.chunk, settings.temperature
        )
        self.reference = _program(model.dpo_mesh, log_probs, {"params": base})
        self.log_probs = _program(model.dpo_mesh, log_probs, {"params": base, "lora": adapter})

    def batches(self, adapter: Any, updates: Sequence[Batch]) -> list[list[Batch]]:
        """Each update's batch as micro-batches on the mesh, with what the losses lack.

        Args:
            adapter: The policy before the first update.
            updates: From `pack_sampled`.
        """
        settings, made = self._settings, []
        for batch in updates:
            rows = len(batch["tokens"]) // settings.accumulation
            parts = []
            for first in range(0, len(batch["tokens"]), rows):
                part = self._device_put(batch, slice(first, first + rows))
                lacking = {}
                if settings.kl_weight:
                    lacking["reference"] = self.reference({"params": self._params}, part)
                if settings.updates > 1:
                    policy = {"params": self._params, "lora": adapter}
                    lacking["old"] = self.log_probs(policy, part)
                parts.append(part | lacking)
            made.append(parts)
        return made

    def kl(self, batch: Batch) -> float:
        """The mean `k3` of some rows of an update's batch, by their log-probabilities when sampled.

        Where nothing is learned of the KL, this much is worth looking at it.
        """
        share = slice(0, kl_rows(len(batch["tokens"]), self._mesh))
        part = self._device_put(batch, share)
        reference = whole(self.reference({"params": self._params}, part))
        real = batch["responses"][share] > 0
        return float(np.mean(k3(batch["sampled"][share][real], np.asarray(reference)[real])))

    def _device_put(self, batch: Batch, rows: slice) -> Batch:
        part = {name: x[rows] for name, x in batch.items()}
        return device_put(part, batch_sharding(self._mesh))

    def learn(
        self, state: TrainState, updates: Sequence[Sequence[Batch]], rate: float
    ) -> tuple[TrainState, dict[str, np.ndarray]]:
        """All updates of a step, `passes` times over: the state after them, and mean metrics."""
        several: list[dict[str, jax.Array]] = []
        for _ in range(self._settings.passes):
            for parts in updates:
                for part in parts:
                    state, metrics = self.setup.step(state, self._params, part, np.float32(rate))
                    several.append(metrics)
        columns = {name: np.array([m[name] for m in several]) for name in several[0]}
        means = {name: column.mean() for name, column in columns.items()}
        return state, {**means, "largest_mismatch": columns["largest_mismatch"].max()}


def policy_trainer(model: GeneratorModel, settings: GrpoSettings) -> PolicyTrainer:
    """What learns in a round, by the config's section `grpo`."""
    return PolicyTrainer(model, settings, policy_optimizer(settings))


def _log_probs(module, samples, chunk, temperature, variables, batch):
    return sampled_log_probs(
        module, variables, batch, responses=samples, chunk=chunk, temperature=temperature
    )[0]


def _program(mesh: Mesh, function: Any, *shardings: Any) -> Program:
    rows = batch_sharding(mesh)
    return jax.jit(on_mesh(mesh, function), in_shardings=(*shardings, rows), out_shardings=rows)
