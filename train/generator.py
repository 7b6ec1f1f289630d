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

from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file
from expandr_jax.loading import load_generator_model
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.adapter import kept_reference
from expandr_jax.objectives.adapter_stage import (
    adapter_round,
    adapter_trainer,
    lowest_loss_on_dev,
)
from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.settings import DpoSettings
from expandr_jax.pair import GeneratorModel, check_meshes, model_hashes
from expandr_jax.runtime.journals import CommonJournal
from expandr_jax.runtime.run import Run
from expandr_jax.sharding import whole
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
    section: str = "",
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
        objective: What is learned; None: as the config has it.
        section, settings: How, and what the config calls that; "" and None: as it has it.

    Returns:
        The trained adapter, as each process can read it all: the last, or the best on dev pairs
        where the config says so.

    Raises:
        UserError: There are no pairs, a setting does not fit them or the mesh, or a loss is not
            finite.
    """
    config, settings = run.config, settings or run.config.learned
    objective, section = objective or config.objective, section or config.step_b_kind.section
    own = adapter_round(
        objective, section, settings, models, rows, config.seed, round_, run.reporter,
        run.processes,
    )  # fmt: skip
    stage = run.trained_stage(name, round_)
    if round_:  # Rounds differ in their number of examples: steps cannot be numbered through.
        directory = run.checkpoints(f"{name}-{round_}")
        stage = dataclasses.replace(stage, checkpoints=directory)
    reference_of = functools.partial(kept_reference, run.checksums, run.reporter)
    trainer = adapter_trainer(stage, models, own, adapter, reference_of)
    if not own.dev_count:
        if settings.dev_share:
            run.reporter.say(f"too few pairs for {section}.dev_share: the last adapter is used")
        return whole(trainer.train(own.steps))
    best_name, journal = f"round-{round_}/best-adapter", CommonJournal(stage.journal, run.processes)

    def keep(adapter: Any) -> None:
        write_adapter(run, models.generator, adapter, best_name)
        run.checksums.record(best_name)

    best = lowest_loss_on_dev(stage, own, trainer, journal, keep)
    trained = whole(trainer.train(own.steps))
    if not run.checksums.intact(best_name):
        journal.keep(0)
        raise UserError(
            f"{run.path(best_name)}: was damaged; remove {stage.checkpoints}, and the same "
            "command trains it again"
        )
    run.reporter.say(
        f"lowest dev loss {best['loss']:.4f}, of step {best['step']}: {run.path(best_name)}"
    )
    if not settings.keep_best:
        return trained
    return load_adapter(str(run.path(best_name)), models.generator.module.config)[1]


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
) -> tuple[Sequence[Any], dict[str, int]]:
    """What an objective reads of a file, and what it leaves out: `Objective.read`."""
    threshold = config.reward.threshold
    return objective.read(path, generator, config.learned, config.expansion, threshold, own=own)


def _read(run: Run, generator: Generator, own: bool) -> Sequence[Any]:
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
