"""Trains the generator's adapter by DPO on preference pairs, or on candidates by their rewards.

    python -m train.generator --config=configs/dpo.py --workdir=DIR \\
        --config.data.path=preferences.jsonl

trains it alone, on any file in TRL's formats; `train.joint` calls the same function. With
--config.dpo.loss=reward-sft the file is a candidates.jsonl, or {"prompt", "candidates": [{"text",
"reward"}]} a line. The same command again continues where it stopped.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.batches import batch_indices
from expandr_jax.data.preferences import read_preferences
from expandr_jax.data.records import hash_file, hash_json, write_json
from expandr_jax.errors import UserError
from expandr_jax.model_hashes import model_hashes
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.candidates import (
    CandidateBatches,
    counted,
    is_rewarded,
    objective,
    rewarded_rows,
    tokenize_candidates,
)
from expandr_jax.objectives.pairs import DevPairs, PairBatches, tokenize_pairs
from expandr_jax.pair import GeneratorModel, check_meshes, load_generator_model
from expandr_jax.planning.flops import FROZEN, forward_flops
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import batch_divisor, whole
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.training.loop import fit
from expandr_jax.training.setup import check_batch_size
from expandr_jax.training.steps import adapter_program
from expandr_jax.training.train_state import OptimizerConfig, TrainState, make_optimizer
from expandr_jax.weights.adapter import base_name, export_adapter
from train.launch import define_config, define_processes, define_workdir, launch, make_console


def hold_out(
    rows: Sequence[dict[str, Any]], share: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divides rows into dev and training ones, each in their order.

    They come sorted by query, so the first ones are of one kind: of one package, one source. The
    sha256 of the prompts is not, and holds out all rows of one prompt, as far as the number goes.

    Args:
        rows: With "prompt", a string or chat messages.
        share: Of the rows, to hold out.
    """
    drawn = sorted(range(len(rows)), key=lambda row: hash_json(rows[row]["prompt"]))
    dev = set(drawn[: int(len(rows) * share)])
    return (
        [row for number, row in enumerate(rows) if number in dev],
        [row for number, row in enumerate(rows) if number not in dev],
    )


def train_generator(
    run: Run,
    models: GeneratorModel,
    adapter: Any | None,
    rows: Sequence[dict[str, Any]],
    *,
    round_: int,
) -> Any:
    """One round of step B.

    Args:
        run: The workdir; checkpoints go to checkpoints/generator, for later rounds
            checkpoints/generator-R, and the best adapter to round-R/best-adapter.
        models: The generator and mesh.
        adapter: The adapter to start from; None starts a new one.
        rows: Preference rows, as in preferences.jsonl; of reward-sft, those of `rewarded_rows`.
        round_: Counts from 0.

    Returns:
        The trained adapter, as each process can read it all: the last, or the best on dev pairs
        where the config says so.

    Raises:
        UserError: There are no pairs, a setting does not fit them or the mesh, or a loss is not
            finite.
    """
    config = run.config.dpo
    rewarded = is_rewarded(config)
    tokenize = functools.partial(
        tokenize_candidates if rewarded else tokenize_pairs,
        models.generator,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        **({"temperature": config.reward_temperature} if rewarded else {}),
    )
    held_out, others = hold_out(rows, config.dev_share)
    (dev_pairs, dev_cut), (pairs, cut) = tokenize(held_out), tokenize(others)
    if dev_cut + cut:
        run.console.print(f"  {dev_cut + cut} prompts or responses were cut to their limits")
    longest = max((example.positions for example in (*dev_pairs, *pairs)), default=0)
    made_for = models.generator.module.config.max_positions
    if longest > made_for:
        run.console.print(
            f"  a prompt and a response have up to {longest} tokens together; the generator was "
            f"made for {made_for}"
        )
    accumulation, devices = config.accumulation, batch_divisor(models.dpo_mesh)
    check_batch_size("dpo.batch_size", config.batch_size, models.dpo_mesh)
    batch_size = min(config.batch_size, len(pairs) // devices * devices)
    kind = CandidateBatches if rewarded else PairBatches
    if not batch_size:
        raise UserError(
            f"{len(pairs)} {kind.examples} to train the generator on; expected {devices} or more"
        )
    updates = max(1, round(config.epochs * (len(pairs) // batch_size) / accumulation))
    steps = updates * accumulation
    module, params = models.generator.module, models.generator_params
    optimizer = make_optimizer(
        OptimizerConfig(
            learning_rate=config.learning_rate,
            total_steps=updates,
            warmup_steps=min(config.warmup_steps, updates // 2),
            clip_norm=config.clip_norm,
            accumulation=accumulation,
        )
    )
    batches = kind(run, models, batch_size, objective(config))

    def chosen(number: int) -> np.ndarray:
        """The examples of a step."""
        return batch_indices(run.config.seed, round_ * steps + number, len(pairs), batch_size)

    batches.choose_shapes(pairs, [chosen(number) for number in range(steps)])
    reference = batches.reference(pairs, "reference log-probabilities")
    dev = DevPairs(run, models, batches, dev_pairs, round_)
    lora = module.lora
    if adapter is None:
        adapter = init_lora(jax.random.key(run.config.seed), params, lora)
    identity = {
        "model": models.generator_hash,
        "settings": hash_json(identity_of("dpo", config)),
        "lora": hash_json([lora.rank, lora.alpha, lora.dropout, list(lora.targets)]),
        "steps": steps,
    }
    # Rounds differ in their number of pairs, so their steps cannot be numbered through.
    name = f"generator-{round_}" if round_ else "generator"
    checkpoints = Checkpoints(
        run.checkpoints(name),
        identity,
        keep=run.config.keep,
        keep_period=steps,
        agree=run.processes.all,
    )
    places = TrainState.shardings(models.dpo_mesh, models.adapter_shardings, adapter, optimizer)
    step = adapter_program(
        models.dpo_mesh,
        places,
        models.base_shardings,
        values=batches.values,
        module=module,
        config=batches.settings,
        optimizer=optimizer,
    )
    key = jax.random.fold_in(jax.random.key(run.config.seed), round_)

    @functools.cache
    def flops(tokens: int, logits: int) -> int:
        return FROZEN * forward_flops(module, params, 1, tokens, logits=logits)

    def batch(number: int) -> tuple[dict[str, Any], Contents]:
        indices = chosen(number)
        drawn = [pairs[i] for i in indices]
        contents = Contents(
            [pair.name for pair in drawn],
            sum(pair.tokens for pair in drawn),
            sum(flops(pair.tokens, pair.tokens - len(pair.prompt)) for pair in drawn),
        )
        return batches.pack(pairs, indices, reference), contents

    # Evaluated in between, it goes on from its checkpoint each time, as after a restart.
    def train(last: int) -> Any:
        """The adapter after step `last`."""
        return fit(
            run.training_log("generator", round_),
            TrainState.create(adapter, optimizer, places),
            lambda state, batch: step(state, params, batch, key),
            batch,
            first_step=0,
            steps=last,
            checkpoints=checkpoints,
            save_every=config.save_every * accumulation,
        ).params

    for last in dev.steps_left(steps, config.eval_every * accumulation):
        dev.evaluate(last, train(last))
    trained, best = whole(train(steps)), dev.best()
    if best is None:
        if config.dev_share:
            run.console.print("  too few pairs for dpo.dev_share: the last adapter is used")
        return trained
    return best if config.keep_best else trained


def train_adapter(
    config: Mapping[str, Any] | Config, workdir: str | os.PathLike, console: Console
) -> pathlib.Path:
    """Trains, or goes on training, an adapter on the config's file of preference pairs.

    Args:
        config: As from configs/dpo.py.
        workdir: Where everything goes.
        console: Where progress is shown.

    Returns:
        The adapter, in PEFT form.

    Raises:
        UserError: Something the user gave is wrong; what was done so far stays.
    """
    config = read_config(config)
    check_meshes(config.mesh, ("sampling", "dpo"))
    if config.data.kind != "preferences":
        raise UserError(
            f"data.kind is {config.data.kind!r}; train.generator reads 'preferences', "
            "as configs/dpo.py has it"
        )
    if not config.data.path:
        raise UserError("a file of pairs is missing: add --config.data.path=preferences.jsonl")
    run = Run(workdir, config, console)
    with run.phase("model"):
        model = load_generator_model(config)
        run.check_models(model_hashes(model))
    with run.phase("data"):
        rows = _read_pairs(run, model.generator)
    with run.phase("reward-sft" if is_rewarded(config.dpo) else "DPO"):
        adapter = train_generator(run, model, None, rows, round_=0)
    directory = run.path("export", "adapter")
    with run.phase("export"):
        module, base = model.generator.module, base_name(run.address, config.generator.source)
        run.processes.once(
            lambda: export_adapter(directory, adapter, module.lora, module.config, base)
        )
    console.print(f"adapter: {run.where(directory)}", soft_wrap=True)
    run.close()
    return directory


def _read_pairs(run: Run, generator: Generator) -> list[dict[str, Any]]:
    """The rows of the config's file, which must stay the same for as long as the run lasts."""
    config = run.config
    path = pathlib.Path(config.data.path)
    limits = {
        "prompt_length": config.dpo.prompt_length,
        "on_bad_pair": config.dpo.on_bad_pair,
    }
    if is_rewarded(config.dpo):
        rows, dropped = rewarded_rows(config, generator, path, **limits)
    else:

        def learned(text: str) -> list[int]:
            ids = generator.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return generator.response_ids(ids, config.dpo.response_length)[0]

        rows, dropped = read_preferences(path, generator.tokenizer, learned=learned, **limits)
    run.console.print(f"  {counted(len(rows), dropped, config.dpo)}")
    if not rows:
        raise UserError(f"{path}: has nothing to train on")
    source_path = run.path("data", "SOURCE.json")
    files = {str(path): hash_file(path)}

    def check() -> None:
        if not source_path.exists():
            source = {"name": path.stem, "files": files, "pairs": len(rows), "dropped": dropped}
            write_json(source_path, source)
        elif run.read_json(source_path).get("files") != files:
            raise UserError(f"{path}: has changed since this run began; use a new --workdir")

    run.processes.main_first(check)
    return rows


def main(_: Any) -> None:
    train_adapter(flags.FLAGS.config, flags.FLAGS.workdir, make_console())


def define_flags() -> None:
    define_config()
    define_workdir()
    define_processes()


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
