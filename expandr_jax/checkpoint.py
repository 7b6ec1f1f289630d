"""Checkpoints by Orbax that are checked when they are read back.

Orbax finishes or leaves out a save that is killed, but restores a file with a flipped byte as if
nothing were wrong, and casts a wrong type silently. So each checkpoint carries the hash of its
content and the shape and type of every leaf; one that does not match is set aside by name.
"""

import hashlib
import logging
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from expandr_jax.errors import UserError

logger = logging.getLogger(__name__)


def hash_tree(tree: Any) -> str:
    """sha256 over every leaf's path, type, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _spec(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


class Checkpoints:
    """The steps saved in one directory.

    Args:
        directory: Where Orbax keeps them; made if absent.
        identity: What a checkpoint belongs to (base weights, settings); restoring one that was
            saved under another identity is refused.
        keep: How many of the latest steps stay.
        keep_period: Steps that are a multiple of this stay as well.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        identity: Mapping[str, Any],
        *,
        keep: int = 2,
        keep_period: int | None = None,
    ):
        self.directory = pathlib.Path(directory).absolute()
        self.identity = dict(identity)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_period,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise UserError(f"{self.directory}: cannot be used for checkpoints: {error}") from None

    def save(self, step: int, tree: Any) -> None:
        """Writes one step; returns when it is on disk."""
        record = {"sha256": hash_tree(tree), "spec": _spec(tree), "identity": self.identity}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record)
            ),
            force=True,
        )
        if not saved:
            raise UserError(f"{self.directory}: step {step} exists already and was not overwritten")
        self._manager.wait_until_finished()

    def restore(
        self, template: Any, *, after: int = -1, at_most: int | None = None
    ) -> tuple[int, Any] | None:
        """The newest intact step, as (step, tree), or None where there is none.

        Args:
            template: A tree of arrays (or ShapeDtypeStructs with shardings) to restore into.
            after: Only steps above this.
            at_most: Only steps up to this.

        Raises:
            UserError: If the newest intact step belongs to another model or other settings.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step <= after or (at_most is not None and step > at_most):
                continue
            try:
                record = self._manager.restore(
                    step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
                )["record"]
                same = record["identity"] == self.identity and record["spec"] == _spec(template)
                if same:
                    tree = self._manager.restore(
                        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
                    )["state"]
                    intact = hash_tree(tree) == record["sha256"]
            except Exception as error:  # Orbax raises bare Exception, KeyError, ... on damage.
                self._set_aside(step, f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            if not same:
                raise UserError(
                    f"{self.directory / str(step)}: saved by a run with another base model or "
                    "other settings; use a new --workdir, or the config that made this one"
                )
            if intact:
                return step, tree
            self._set_aside(step, "its content does not match its hash")
        return None

    def _set_aside(self, step: int, reason: str) -> None:
        target = self.directory.with_name(f"{self.directory.name}-damaged") / str(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        (self.directory / str(step)).rename(target)
        self._manager.reload()
        logger.warning("checkpoint %s is damaged (%s); moved to %s", step, reason[:200], target)
