"""Trains the generator's adapter by DPO on preference pairs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.checkpoint import Checkpoints
from expandr_jax.data.batches import batch_indices
from expandr_jax.data.records import hash_json
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import init_lora
from expandr_jax.preference import (
    DPOConfig,
    PreferencePair,
    dpo_loss,
    dpo_step,
    pack,
    response_log_probs,
)
from expandr_jax.sharding import batch_sharding
from expandr_jax.train_state import OptimizerConfig, TrainState, make_optimizer
from train.loop import fit
from train.models import Models
from train.run import Run


def tokenize_pairs(
    generator: Generator,
    rows: Sequence[dict[str, Any]],
    *,
    prompt_length: int,
    response_length: int,
) -> tuple[list[PreferencePair], int]:
    """Preference rows to ids: the end of the prompt, the start of each response, one EOS on each.

    Args:
        generator: For its tokenizer.
        rows: {"prompt", "chosen", "rejected"}, the prompt with the chat template applied.
        prompt_length: Most tokens of a prompt.
        response_length: Most tokens of a response, EOS included.

    Returns:
        The pairs, and how many texts had to be cut.
    """
    pairs, cut = [], 0
    for row in rows:
        texts = [row[name] for name in ("prompt", "chosen", "rejected")]
        ids = generator.tokenizer(texts, add_special_tokens=False)["input_ids"]
        prompt = ids[0][-prompt_length:]
        responses = [[*part[: response_length - 1], generator.eos_ids[0]] for part in ids[1:]]
        cut += (len(ids[0]) > prompt_length) + sum(len(p) >= response_length for p in ids[1:])
        pairs.append(PreferencePair(prompt, *responses))
    return pairs, cut


def train_generator(
    run: Run,
    models: Models,
    adapter: Any | None,
    rows: Sequence[dict[str, Any]],
    *,
    round_: int,
) -> Any:
    """One round of step B.

    Args:
        run: The workdir; checkpoints go to checkpoints/generator.
        models: The generator and mesh.
        adapter: The adapter to start from; None starts a new one.
        rows: Preference rows, as in preferences.jsonl.
        round_: Counts from 0.

    Returns:
        The trained adapter.
    """
    config = run.config.dpo
    pairs, cut = tokenize_pairs(
        models.generator,
        rows,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
    )
    if cut:
        run.console.print(f"  {cut} prompts or responses were cut to their limits")
    dev = pairs[: int(len(pairs) * config.dev_share)]
    pairs = pairs[len(dev) :]
    batch_size = min(config.batch_size, len(pairs))
    steps = max(1, round(config.epochs * (len(pairs) // batch_size)))
    settings = DPOConfig(
        beta=config.beta,
        kind=config.loss,
        label_smoothing=config.label_smoothing,
        length_normalized=config.length_normalized,
        sft_weight=config.sft_weight,
        chunk=config.chunk,
    )
    module, params = models.generator.module, models.generator_params
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=config.learning_rate,
            total_steps=steps,
            warmup_steps=min(config.warmup_steps, steps // 2),
            clip_norm=config.clip_norm,
        )
    )
    batches = _Batches(run, models, settings.chunk)
    reference = batches.reference(pairs, batch_size, "reference log-probabilities")
    lora = module.lora
    if adapter is None:
        adapter = init_lora(jax.random.key(run.config.seed), params, lora)
    identity = {
        "model": models.generator_hash,
        "settings": hash_json(config.to_dict()),
        "lora": hash_json([lora.rank, lora.alpha, lora.dropout, list(lora.targets)]),
        "steps": steps,
    }
    checkpoints = Checkpoints(
        run.path("checkpoints", "generator"), identity, keep=run.config.keep, keep_period=steps
    )
    step = jax.jit(
        functools.partial(dpo_step, module=module, config=settings, optimizer=optimizer),
        donate_argnums=0,
    )
    key = jax.random.fold_in(jax.random.key(run.config.seed), round_)

    def batch(number: int) -> dict[str, np.ndarray]:
        chosen = batch_indices(run.config.seed, round_ * steps + number, len(pairs), batch_size)
        return batches.pack(pairs, chosen, reference)

    state = fit(
        run,
        "generator",
        round_,
        TrainState.create(adapter, optimizer),
        lambda state, batch: step(state, params, batch, key),
        batch,
        first_step=round_ * steps,
        steps=steps,
        checkpoints=checkpoints,
        save_every=config.save_every,
    )
    if len(dev) >= batch_size:
        figures = batches.evaluate(state.params, dev, batch_size, settings)
        run.metrics.rewind("generator-dev", round_, 0)
        run.metrics.write("generator-dev", round_, steps, figures)
    return state.params


class _Batches:
    """Packed batches of one preference set, on the mesh."""

    def __init__(self, run: Run, models: Models, chunk: int):
        self.run, self.models = run, models
        self.sharding = batch_sharding(models.mesh)
        self._log_probs = jax.jit(
            functools.partial(response_log_probs, models.generator.module, chunk=chunk)
        )

    def pack(
        self, pairs: Sequence[PreferencePair], chosen: Sequence[int], reference: np.ndarray
    ) -> dict[str, Any]:
        """The batch of the pairs `chosen`, with the reference's log-probabilities."""
        batch = pack([pairs[i] for i in chosen], self.models.generator.pad_id)
        batch["reference_chosen"], batch["reference_rejected"] = reference[chosen].T
        return jax.device_put(batch, self.sharding)

    def reference(self, pairs: Sequence[PreferencePair], batch_size: int, task: str) -> np.ndarray:
        """Log-probabilities of both responses under the base, adapter off: [pairs, 2] float32.

        They are kept beside the pairs and used again only for the same pairs and weights.
        """
        identity = hash_json([self.models.generator_hash, [_ids(p) for p in pairs]])
        path = self.run.path("work", f"reference-{identity[:16]}.npy")
        if path.exists():
            return np.load(path, allow_pickle=False)
        result = np.zeros((len(pairs), 2), np.float32)
        variables = {"params": self.models.generator_params}
        with self.run.progress(task, len(pairs)) as advance:
            # Pairs of like length share a batch; the last batch is filled with its first pair.
            order = sorted(range(len(pairs)), key=lambda i: sum(map(len, _ids(pairs[i]))))
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                filled = chosen + chosen[:1] * (batch_size - len(chosen))
                batch = pack([pairs[i] for i in filled], self.models.generator.pad_id)
                both = self._log_probs(variables, jax.device_put(batch, self.sharding))[:2]
                result[chosen] = np.stack(both, axis=1)[: len(chosen)]
                advance(len(chosen))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, result)
        temporary.replace(path)
        return result

    def evaluate(
        self, adapter: Any, pairs: Sequence[PreferencePair], batch_size: int, settings: DPOConfig
    ) -> dict[str, float]:
        """Mean loss, accuracy and margin on held-out pairs, whole batches of them."""
        reference = self.reference(pairs, batch_size, "reference on dev pairs")
        loss_fn = jax.jit(
            functools.partial(dpo_loss, module=self.models.generator.module, config=settings)
        )
        totals: dict[str, float] = {}
        count = len(pairs) // batch_size
        for start in range(0, count * batch_size, batch_size):
            batch = self.pack(pairs, range(start, start + batch_size), reference)
            loss, metrics = loss_fn(adapter, self.models.generator_params, batch)
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / count
        return totals


def _ids(pair: PreferencePair) -> tuple[list[int], list[int], list[int]]:
    """A pair's ids as plain lists."""
    return list(pair.prompt), list(pair.chosen), list(pair.rejected)
