"""Checkpoints by Orbax, written while training goes on and checked when they are read back.

Orbax finishes or leaves out a save that is killed, but restores a file with a flipped byte as if
nothing were wrong, and casts a wrong type silently. So each checkpoint carries the hash of its
content and the shape and type of every leaf; one that does not match is set aside by name.
"""

import errno
import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.files.records import hash_json
from expandr_jax.sharding import replicated

logger = logging.getLogger(__name__)


def _checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums [2] uint32 over mixed words and positions of an array, and whether all is finite.

    The sums do not depend on how the array is spread over devices, and no other value of a single
    word has the same ones.
    """
    finite = jnp.all(jnp.isfinite(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    position = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) & 0xFFFFFFFF
        position += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    sums = []
    for seed in (0x2545F491, 0x9E3779B9):
        h = words ^ (position * jnp.uint32(0x85EBCA77) + jnp.uint32(seed))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finalizer.
            h = (h ^ (h >> shift)) * jnp.uint32(factor)
        sums.append(jnp.sum(h ^ (h >> 16), dtype=jnp.uint32))
    return jnp.stack(sums), finite


@functools.lru_cache(maxsize=8)
def checksum_program(mesh: Mesh | None) -> Callable[..., Any]:
    """`_checksum`; with a mesh, of an array that several processes hold: each of them knows it."""
    return jax.jit(_checksum, out_shardings=replicated(mesh) if mesh else None)


def checksum_tree(tree: Any) -> tuple[str, list[str]]:
    """A hash over every leaf's path, type, shape and content, and the paths of leaves that are not
    finite.

    It is computed where the leaves are, and is the same on every mesh. It finds damage; against a
    forger take `hash_tree`.
    """
    digest, bad = hashlib.sha256(), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name, leaf = jax.tree_util.keystr(path), jnp.asarray(leaf)
        program = checksum_program(None if leaf.is_fully_addressable else leaf.sharding.mesh)
        # One after another: many small programs at once that sum over the same devices can wait
        # for each other without end where the devices are a processor's.
        sums, finite = jax.device_get(program(leaf))
        digest.update(f"{name} {leaf.dtype} {leaf.shape} {sums[0]} {sums[1]}\n".encode())
        if not finite:
            bad.append(name)
    return digest.hexdigest(), bad


def _spec(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


class Checkpoints:
    """The steps saved in one directory.

    Args:
        directory: Where Orbax keeps them; made if absent. gs://BUCKET/DIRECTORY: in a bucket.
        identity: What a checkpoint belongs to (base weights, settings); restoring one that was
            saved under another identity is refused.
        older: Further entries that follow from the identity's; asked for where a checkpoint lacks
            some of these, and may have others in their place, as an older version saved it.
        keep: How many of the latest steps stay.
        keep_period: Steps that are a multiple of this stay as well.
        agree: Whether something is true in every process, where there are several; they save and
            restore together.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        identity: Mapping[str, Any],
        *,
        older: Callable[[], Mapping[str, Any]] = dict,
        keep: int = 2,
        keep_period: int | None = None,
        agree: Callable[[bool], bool] = bool,
    ):
        self._agree = agree
        self._in_bucket = os.fspath(directory).startswith("gs://")
        self.directory = epath.Path(directory if self._in_bucket else os.path.abspath(directory))
        self.identity, self._older = dict(identity), older
        import orbax.checkpoint as ocp  # Here, for it takes a fifth of a second.

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_period,
            cleanup_tmp_directories=not self._in_bucket,
        )
        # A disk's errors; gcsfs and tensorstore raise others.
        expected = Exception if self._in_bucket else OSError
        try:
            if self._in_bucket:
                self._clean_bucket()
            else:  # A bucket has no directories.
                self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except expected as error:
            raise UserError(f"{self.directory}: cannot be used for checkpoints: {error}") from None

    def _clean_bucket(self) -> None:
        """Removes the remains of saves that were killed.

        Orbax would while it looks for steps, and a directory whose last object goes is none then.
        """
        if jax.process_index() == 0 and self.directory.exists():
            for step in list(self.directory.iterdir()):
                done = step / self._ocp.path.atomicity.COMMIT_SUCCESS_FILE
                if step.is_dir() and not done.exists():
                    step.rmtree()
        self._agree(True)  # The others look when that is done.

    def save(self, step: int, tree: Any) -> None:
        """Begins to write one step; the tree may be donated as soon as this returns.

        A save that is still going on is waited for, so that no more than two are ever lost.

        Raises:
            NotFiniteError: If a number of the tree is not finite.
            UserError: If this or the previous step cannot be written.
        """
        content, bad = checksum_tree(tree)
        if bad:
            raise NotFiniteError(f"after step {step}, {bad[0]} is not finite and was not saved")
        record = {"hash": content, "spec": _spec(tree), "identity": self.identity}
        record["record"] = hash_json(record)
        try:
            saved = self._manager.save(
                step,
                args=self._ocp.args.Composite(
                    state=self._ocp.args.StandardSave(tree), record=self._ocp.args.JsonSave(record)
                ),
                force=True,
            )
        except Exception as error:
            raise self._unwritten(error) from error
        if not saved:
            raise UserError(f"{self.directory}: step {step} exists already and was not overwritten")

    def wait(self) -> None:
        """Returns when all that was saved is on disk; errors as of `save`."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Tensorstore's, Orbax's threads', the disk's.
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        if "No space left" in reason or "ENOSPC" in reason:
            reason = "no space left on the disk"
        return UserError(
            f"{self.directory}: a checkpoint cannot be written: {reason[:300]}; mend that, and the "
            "same command goes on from the one before"
        )

    def restore(
        self, template: Any, *, after: int = -1, at_most: int | None = None
    ) -> tuple[int, Any] | None:
        """The newest intact step above `after` and up to `at_most`, as (step, tree), or None.

        Args:
            template: A tree of arrays (or ShapeDtypeStructs with shardings) to restore into.

        Raises:
            UserError: If the newest intact step belongs to another model or other settings, or
                one cannot be read for a reason that is no damage.
        """
        self.wait()
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, template)
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step <= after or (at_most is not None and step > at_most):
                continue
            record, problem = self._attempt(self._record, step)
            if problem is None and not (
                self._has(record["identity"]) and record["spec"] == _spec(template)
            ):
                raise UserError(
                    f"{self.directory / str(step)}: saved by a run with another base model or "
                    "other settings; use a new --workdir, or the config that made this one"
                )
            if problem is None:
                tree, problem = self._attempt(self._state, step, abstract)
            if problem is None and checksum_tree(tree)[0] != record["hash"]:
                problem = "its content does not match its hash"
            if problem is None:
                return step, tree
            self._set_aside(step, problem)
        return None

    def forget(self, after: int) -> None:
        """Removes all steps above `after`; all processes call it together."""
        self.wait()
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step > after:
                self._manager.delete(step)
        self._agree(True)
        self._manager.reload()

    def _has(self, identity: Mapping[str, Any]) -> bool:
        """Whether an identity equals this one; one of an older version may lack some entries."""
        own = self.identity
        if not own.keys() <= identity.keys():
            own = {**self._older(), **own}
        return own.items() >= identity.items()

    def _record(self, step: int) -> dict[str, Any]:
        """The metadata that was saved with a step's state."""
        record = self._ocp.JsonCheckpointHandler().restore(self.directory / str(step) / "record")
        if record.pop("record") != hash_json(record):
            raise ValueError("its record does not match its hash")
        return record

    def _state(self, step: int, abstract: Any) -> Any:
        # Not by the manager, which waits for all processes when it has read: where one of them
        # finds damage, the others would wait without end.
        return self._ocp.StandardCheckpointHandler().restore(
            self.directory / str(step) / "state", args=self._ocp.args.StandardRestore(abstract)
        )

    def _attempt(self, read: Callable[..., Any], *of: Any) -> tuple[Any, str | None]:
        """What `read` returns, and what went wrong in any process; None where nothing did."""
        value = problem = None
        try:
            value = read(*of)
        except Exception as error:  # Orbax raises bare Exception, KeyError, ... on damage.
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            if _is_refused(error):
                raise UserError(
                    f"{self.directory}: a checkpoint cannot be read: {problem[:300]}; the same "
                    "command goes on from here"
                ) from None
        if not self._agree(problem is None):
            problem = problem or "another process cannot read it"
        return value, problem

    def _set_aside(self, step: int, reason: str) -> None:
        target = self.directory.with_name(f"{self.directory.name}-damaged") / str(step)
        if jax.process_index() == 0:
            _move(self.directory / str(step), target)
            logger.warning("checkpoint %s is damaged (%s); moved to %s", step, reason[:200], target)
        self._agree(True)  # It is gone for all of them before they look again.
        self._manager.reload()


# What does not say that a checkpoint is damaged: the way to it failed, or there is no room for it.
_REFUSED = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden",
    "RESOURCE_EXHAUSTED",
)  # fmt: skip
_NO_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


def _is_refused(error: Exception) -> bool:
    """Whether an error is about access or room, and so no sign of a damaged checkpoint."""
    modules = ("aiohttp", "requests", "google.auth", "gcsfs")
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in _NO_DAMAGE)
        or type(error).__module__.startswith(modules)
        or any(word in str(error) for word in _REFUSED)
    )


def _move(source: epath.Path, target: epath.Path) -> None:
    """Moves a directory to where another may be; in a bucket object by object."""
    if target.exists():
        target.rmtree()
    if not os.fspath(source).startswith("gs://"):
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        return
    for path in _files(source):
        path.copy(target / path.relative_to(source), overwrite=True)
    source.rmtree()


def _files(directory: epath.Path) -> Iterator[epath.Path]:
    """The files of a directory and of those within; a bucket has no `rglob`, and its `walk` gives
    paths that are not below the directory's own."""
    for path in directory.iterdir():
        if path.is_dir():
            yield from _files(path)
        else:
            yield path
