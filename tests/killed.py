"""`train.joint` whose process is killed in a phase: --kill_in=PHASE --kill_after=NAME in `CALLS`.

Without these two it is `train.joint`.
"""

import contextlib
import functools
import os
import signal
from collections.abc import Iterator
from typing import Any

from absl import flags

from expandr_jax.runtime.journals import DividedJournal
from expandr_jax.runtime.run import Run
from expandr_jax.search import ExactIndex
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.vectors import corpus
from expandr_jax.vectors.encoder import TextEncoder
from train.joint import train_joint
from train.launch import launch_training

# What has just been called when the process is killed.
CALLS = {
    "vectors in a file": (corpus, "encode_to_file"),
    "vectors": (TextEncoder, "encode"),
    "search": (ExactIndex, "search"),
    "texts in a journal": (DividedJournal, "append"),
    "a save": (Checkpoints, "save"),
}


def kill_in(name: str, call: str) -> None:
    """Has this process killed as soon as something was called in a phase of a run."""
    phases, phase = [], Run.phase

    @contextlib.contextmanager
    def noted(run: Run, name: str) -> Iterator[None]:
        with phase(run, name):
            phases.append(name)
            yield
            phases.pop()

    owner, function = CALLS[call]
    called = getattr(owner, function)

    @functools.wraps(called)
    def last(*args: Any, **kwargs: Any) -> Any:
        found = called(*args, **kwargs)
        if phases[-1:] == [name]:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Run.phase = noted
    setattr(owner, function, last)


def train(config: Any, workdir: str, console: Any) -> None:
    """`train_joint`, killed where the flags say so."""
    if flags.FLAGS.kill_in:
        kill_in(flags.FLAGS.kill_in, flags.FLAGS.kill_after)
    train_joint(config, workdir, console)


if __name__ == "__main__":
    flags.DEFINE_string("kill_in", None, "The phase.")
    flags.DEFINE_enum("kill_after", None, [*CALLS], "What is called there.")
    launch_training(train)
