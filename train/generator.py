"""Trains the generator's adapter by DPO on preference pairs, or on candidates by their rewards.

    python -m train.generator --config=configs/dpo.py --workdir=DIR \\
        --config.data.path=preferences.jsonl

trains it alone, on any file in TRL's formats; `train.joint` calls the same function. With
--config.step_b=reward-sft the file is a candidates.jsonl, or {"prompt", "candidates": [{"text",
"reward"}]} a line. The same command again continues where it stopped.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.data.batches import batch_indices
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file, hash_json
from expandr_jax.loading import load_generator_model
from expandr_jax.models.generator import Generator
from expandr_jax.models.lora import init_lora
from expandr_jax.objectives.adapter import (
    AdapterBatches,
    adapter_setup,
    kept_reference,
    make_examples,
)
from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.packing import hash_response_examples
from expandr_jax.objectives.settings import DpoSettings
from expandr_jax.pair import GeneratorModel, check_meshes, model_hashes
from expandr_jax.runtime.formats import identity_of
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.runtime.telemetry import Contents
from expandr_jax.sharding import batch_divisor, whole
from expandr_jax.training.early_stopping import watch_dev
from expandr_jax.training.flops import FROZEN, forward_flops
from expandr_jax.training.setup import check_batch_size, count_updates, section_optimizer
from expandr_jax.training.stage import stage_trainer
from expandr_jax.weights.adapter import base_name, export_adapter, load_adapter
from train.launch import launch_training


def train_generator(
    run: Run,
    models: GeneratorModel,
    adapter: Any | None,
    rows: Sequence[Any],
    *,
    round_: int,
    name: str = "generator",
    objective: Objective | None = None,
    settings: DpoSettings | None = None,
) -> Any:
    """One round of step B, or of what comes before it.

    Args:
        run: The workdir; checkpoints go to checkpoints/NAME, for later rounds checkpoints/NAME-R,
            and the best adapter to round-R/best-adapter.
        models: The generator and mesh.
        adapter: The adapter to start from; None starts a new one.
        rows: What the objective reads.
        round_: Counts from 0.
        name: What it is called in metrics and checkpoints.
        objective, settings: What is learned and how; None: as the config has it.

    Returns:
        The trained adapter, as each process can read it all: the last, or the best on dev pairs
        where the config says so.

    Raises:
        UserError: There are no pairs, a setting does not fit them or the mesh, or a loss is not
            finite.
    """
    config, objective = settings or run.config.learned, objective or run.config.objective
    dev, examples = make_examples(objective, models.generator, rows, config, run.reporter)
    accumulation, devices = config.accumulation, batch_divisor(models.dpo_mesh)
    check_batch_size("dpo.batch_size", config.batch_size, models.dpo_mesh)
    batch_size = min(config.batch_size, len(examples) // devices * devices)
    if not batch_size:
        raise UserError(
            f"{len(examples)} {objective.examples} to train the generator on; expected {devices} "
            "or more"
        )
    updates = count_updates(config, len(examples) // batch_size)
    steps = updates * accumulation
    module, params = models.generator.module, models.generator_params
    start = adapter if config.reference == "start" else None
    batches = AdapterBatches(models, objective, config, batch_size, start)
    lora, seed = module.lora, run.config.seed

    def drawn(step: int) -> np.ndarray:
        """Which examples a step has."""
        return batch_indices(seed, round_ * steps + step, len(examples), batch_size)

    batches.choose_sizes(examples, map(drawn, range(steps)))
    reference = dev_reference = None
    if objective.reference:
        kept = functools.partial(kept_reference, run.checksums, run.reporter, batches)
        reference = kept(examples, "reference log-probabilities")
        dev_reference = kept(dev, "reference on dev pairs") if dev else None
    if adapter is None:
        adapter = init_lora(jax.random.key(seed), params, lora)
    identity = {
        "model": models.generator_hash,
        "settings": hash_json(identity_of("dpo", config) | {"loss": objective.name}),
        "lora": hash_json([lora.rank, lora.alpha, lora.dropout, list(lora.targets)]),
        "steps": steps,
        "generator": models.generator.identity,
        "examples": hash_response_examples([*examples, *dev]),
    }
    stage = run.trained_stage(name, round_)
    if round_:  # Rounds differ in their number of examples: steps cannot be numbered through.
        directory = run.checkpoints(f"{name}-{round_}")
        stage = dataclasses.replace(stage, checkpoints=directory)
    setup = adapter_setup(models, objective, config, section_optimizer(config, updates))
    key = jax.random.fold_in(jax.random.key(seed), round_)

    @functools.cache
    def flops(tokens: int, logits: int) -> int:
        return FROZEN * forward_flops(module, params, 1, tokens, logits=logits)

    def batch(step: int) -> tuple[dict[str, Any], Contents]:
        indices = drawn(step)
        taken = [examples[i] for i in indices]
        contents = Contents(
            [example.name for example in taken],
            sum(example.tokens for example in taken),
            sum(flops(*example.size) for example in taken),
        )
        return batches.pack(examples, indices, reference), contents

    train = stage_trainer(
        stage,
        setup,
        adapter,
        batch,
        identity=identity,
        settings=config,
        steps=steps,
        frozen=[params],
        key=key,
    )
    if not dev:
        if config.dev_share:
            run.reporter.say("too few pairs for dpo.dev_share: the last adapter is used")
        return whole(train(steps))
    best_name = f"round-{round_}/best-adapter"

    def keep(_: int, adapter: Any) -> None:
        write_adapter(run, models.generator, whole(adapter), best_name)
        run.checksums.record(best_name)

    journal = CommonJournal(stage.journal, run.processes)
    every = config.eval_every * accumulation or steps
    best = watch_dev(
        stage.log,
        journal,
        train,
        lambda adapter: batches.evaluate(adapter, dev, dev_reference),
        keep,
        stops=[*range(every, steps, every), steps],
        score=lambda metrics: -metrics["loss"],
    )
    trained = whole(train(steps))
    if not run.checksums.intact(best_name):
        journal.keep(0)
        raise UserError(
            f"{run.path(best_name)}: was damaged; remove {stage.checkpoints}, and the same "
            "command trains it again"
        )
    run.reporter.say(
        f"lowest dev loss {best['loss']:.4f}, of step {best['step']}: {run.path(best_name)}"
    )
    return load_adapter(str(run.path(best_name)), module.config)[1] if config.keep_best else trained


def write_adapter(run: Run, generator: Generator, adapter: Any, name: str) -> None:
    """Writes an adapter in PEFT form to a path under the workdir."""
    module, base = generator.module, base_name(run.address, run.config.generator.source)
    run.processes.once(
        lambda: export_adapter(run.path(name), adapter, module.lora, module.config, base)
    )


def train_adapter(
    config: Mapping[str, Any] | Config,
    workdir: str | os.PathLike,
    console: Console,
    *,
    own: bool = False,
) -> pathlib.Path:
    """Trains, or goes on training, an adapter on the config's file of preference pairs.

    Args and errors are as of `train.joint.train_joint`, the config as from configs/dpo.py; `own`:
    the file is of a round of `train.joint`, as `Objective.read` has it.

    Returns:
        The adapter, in PEFT form.
    """
    config = read_config(config)
    check_meshes(config.mesh, ("sampling", "dpo"))
    if config.data.kind != "preferences":
        raise UserError(
            f"data.kind is {config.data.kind!r}; train.generator reads 'preferences', "
            "as configs/dpo.py has it"
        )
    if config.objective is None:
        raise UserError(
            f"step_b is {config.step_b!r}, which learns from no file: python -m train.policy"
        )
    if not config.data.path:
        raise UserError("a file of pairs is missing: add --config.data.path=preferences.jsonl")
    run = Run(workdir, config, console)
    config = run.config
    with run.phase("model"):
        model = load_generator_model(config)
        run.check_models(model_hashes(model))
    with run.phase("data"):
        rows = _read(run, model.generator, own)
    with run.phase(config.step_b_kind.phase):
        adapter = train_generator(run, model, None, rows, round_=0)
    directory = run.path("export", "adapter")
    with run.phase("export"):
        write_adapter(run, model.generator, adapter, "export/adapter")
    console.print(f"adapter: {run.where(directory)}", soft_wrap=True)
    run.close()
    return directory


def read_rows(
    objective: Objective, config: Config, path: pathlib.Path, generator: Generator, *, own: bool
) -> tuple[list[Any], dict[str, int]]:
    """What an objective reads of a file, and what it leaves out: `Objective.read`."""
    threshold = config.reward.threshold
    return objective.read(path, generator, config.learned, config.expansion, threshold, own=own)


def _read(run: Run, generator: Generator, own: bool) -> list[Any]:
    """The rows of the config's file, which must stay the same for as long as the run lasts."""
    config = run.config
    path, objective = pathlib.Path(config.data.path), config.objective
    rows, dropped = read_rows(objective, config, path, generator, own=own)
    run.reporter.say(objective.counted(len(rows), dropped))
    if not rows:
        raise UserError(f"{path}: has nothing to train on")
    files = {str(path): hash_file(path)}
    source = {"name": path.stem, "files": files, "pairs": len(rows), "dropped": dropped}
    if run.noted(run.path("data", "SOURCE.json"), source).get("files") != files:
        raise UserError(f"{path}: has changed since this run began; use a new --workdir")
    return rows


if __name__ == "__main__":
    launch_training(train_adapter)
