"""`train.joint`, of which a process is killed in a phase, or damages a file of its own there.

--kill_in=PHASE --kill_after=NAME in `CALLS`; with --spoil=FILE it changes a byte in the middle of
the workdir's file of this name, and goes on. Without these it is `train.joint`.
"""

import contextlib
import functools
import os
import pathlib
import signal
from collections.abc import Iterator
from typing import Any

from absl import flags

from expandr_jax.runtime.journals import DividedJournal
from expandr_jax.runtime.run import Run
from expandr_jax.search import ExactIndex, divided
from expandr_jax.training.checkpoint import Checkpoints
from expandr_jax.vectors import corpus
from expandr_jax.vectors.encoder import TextEncoder
from train.joint import train_joint
from train.launch import launch_training

# What has just been called when the process is killed.
CALLS = {
    "vectors in a file": (corpus, "encode_to_file"),
    "vectors": (TextEncoder, "encode"),
    "vectors for others": (corpus, "write_arrays"),
    "search": (ExactIndex, "search"),
    "results for others": (divided, "write_arrays"),
    "texts in a journal": (DividedJournal, "append"),
    "a save": (Checkpoints, "save"),
}


def end_in(name: str, call: str, workdir: str, spoiled: str | None) -> None:
    """Ends or spoils this process's work as soon as something was called in a phase of a run."""
    phases, phase, left = [], Run.phase, [spoiled]

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
        if phases[-1:] == [name] and left:
            if left.pop() is None:
                os.kill(os.getpid(), signal.SIGKILL)
            spoil(workdir, spoiled)
        return found

    Run.phase = noted
    setattr(owner, function, last)


def spoil(workdir: str, name: str) -> None:
    """Changes a byte of a file."""
    (path,) = pathlib.Path(workdir).rglob(name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def train(config: Any, workdir: str, console: Any) -> None:
    """`train_joint`, killed where the flags say so."""
    values = flags.FLAGS
    if values.kill_in:
        end_in(values.kill_in, values.kill_after, workdir, values.spoil)
    train_joint(config, workdir, console)


if __name__ == "__main__":
    flags.DEFINE_string("kill_in", None, "The phase.")
    flags.DEFINE_enum("kill_after", None, [*CALLS], "What is called there.")
    flags.DEFINE_string("spoil", None, "A file.")
    launch_training(train)
