"""Distills the expanded queries of a finished run into a query tower, which needs no passage.

    python -m train.distill --workdir=RUN

adds the row `expandr-distilled` and export/query-encoder/ to the run of `train.joint` in that
directory; --config.distill.NAME=VALUE sets what configs/base.py has of the section `distill`. It is
that run's own command with distill.epochs above 0: what is done stays, what of the run is not done
yet is done first, and the same command again continues where it stopped.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags
from rich.console import Console

from configs import base
from expandr_jax.config import Config, read_config, read_run_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.runtime import processes
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from train.joint import train_joint
from train.launch import define_processes, define_workdir, launch

EPOCHS = 3.0  # Where neither the run nor the command says how many.


def distill(
    workdir: str | os.PathLike, overrides: Mapping[str, Any], console: Console
) -> dict[str, Any]:
    """Adds a query tower to a run, or goes on with that.

    Args:
        workdir: The run; gs://BUCKET/DIRECTORY: in a bucket.
        overrides: Settings by their names, as "distill.epochs".
        console: Where progress is shown.

    Returns:
        The contents of results.json.

    Raises:
        UserError: There is no such run, or as of `train.joint.train_joint`.
    """
    return train_joint(distilling(read_run_config(_record(workdir)), overrides), workdir, console)


def distilling(config: Config, overrides: Mapping[str, Any]) -> Config:
    """A run's config with a query tower, checked; UserError if the command asks for none."""
    if not overrides.get("distill.epochs", EPOCHS):
        raise UserError("--config.distill.epochs=0: no query tower; expected a number above 0")
    given = {"distill.epochs": config.distill.epochs or EPOCHS, **overrides}
    return read_config(dataclasses.asdict(with_settings(config, given)))


def _record(workdir: str | os.PathLike) -> Any:
    return local_copy(workdir, "config.json") / "config.json"


def main(_: Any) -> None:
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    console = plain_console(soft_wrap=True, quiet=not processes.current().is_main)
    distill(flags.FLAGS.workdir, overrides, console)


def define_flags() -> None:
    section = base.get_config().distill
    section.epochs = EPOCHS
    config_flags.DEFINE_config_dict(
        "config", ConfigDict({"distill": section}), "Settings of the section `distill`."
    )
    define_workdir()
    define_processes()


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
