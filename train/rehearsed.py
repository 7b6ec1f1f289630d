"""One process of a rehearsal: `train.joint`, measured. `train.rehearse` starts it; people need not.

python -m train.rehearsed --settings=CONFIG.json --usage=OUT.json --workdir=DIR
"""

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from expandr_jax.runtime import processes, resources
from expandr_jax.runtime.progress import plain_console
from train.launch import define_processes, define_workdir, launch


def define_flags() -> None:
    """Defines the flags that `train.rehearse` gives."""
    define_workdir()
    define_processes()
    flags.DEFINE_string("settings", None, "The config, as JSON.", required=True)
    flags.DEFINE_string("usage", None, "Where what was measured goes, as JSON.", required=True)


def attend_to_itself(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """In the place of `models.attention.attend`: each token attends to itself alone.

    Scores of 512 tokens with 512 would take nine tenths of a rehearsal's time and memory, and grow
    with no count of texts.
    """
    return jnp.repeat(v[:, -q.shape[1] :], q.shape[2] // v.shape[2], axis=2).astype(q.dtype)


def main(_: Any) -> None:
    values = flags.FLAGS
    # `train.rehearse` gives each process such a directory of its own.
    resources.start(pathlib.Path(values.usage), pathlib.Path(tempfile.gettempdir()))
    # What makes programs is imported when they are timed, and who attends when that is replaced.
    from expandr_jax.models import attention

    attention.attend = attend_to_itself
    from train.joint import train_joint

    settings = json.loads(pathlib.Path(values.settings).read_text(encoding="utf-8"))
    train_joint(settings, values.workdir, plain_console(quiet=not processes.current().is_main))


if __name__ == "__main__":
    launch(main, define_flags)
