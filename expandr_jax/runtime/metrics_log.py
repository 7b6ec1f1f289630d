"""Metrics of every step: metrics.jsonl, TensorBoard and, if asked for, Weights & Biases."""

import importlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_json, write_text

SECONDS_BETWEEN_FLUSHES = 30.0  # TensorBoard's file; metrics.jsonl has each step at once.


class MetricsLog:
    """One record a step.

    Args:
        workdir: Gets metrics.jsonl and tensorboard/; None: nothing is kept.
        project: Project of Weights & Biases; "": it is not used.
        address: What the run is told from others by there; "": its workdir.

    Attributes:
        dropped: Lines of metrics.jsonl that were damaged and are gone.

    Raises:
        UserError: wandb is asked for and not installed.
    """

    dropped = 0

    def __init__(self, workdir: pathlib.Path | None = None, project: str = "", address: str = ""):
        self._workdir, self._events, self._wandb = workdir, None, None
        if workdir is None:
            return
        self._path = workdir / "metrics.jsonl"
        self._flushed = time.monotonic()
        if project:
            self._wandb = _start_wandb(workdir, project, address or str(workdir))
        # The last line, if a kill cut it, is written again.
        self.dropped = sum(line.endswith(b"\n") for line in self._drop_unless(_is_whole))

    def write(
        self,
        phase: str,
        round_: int,
        step: int,
        values: Mapping[str, float],
        costs: Mapping[str, float] | None = None,
    ) -> None:
        """Appends {"phase", "round", "step", ...} with values and costs as floats.

        Raises:
            UserError: The file cannot be written.
        """
        if self._workdir is None:
            return
        values = {name: float(value) for name, value in {**values, **(costs or {})}.items()}
        record = {"phase": phase, "round": round_, "step": step, **values}
        tagged = {f"{phase}/round-{round_}/{name}": value for name, value in values.items()}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self._write_events(tagged, step)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write it: {error.strerror}") from error
        if self._wandb is not None:
            self._wandb.log({**tagged, f"{phase}/round-{round_}/step": step})

    def rewind(self, phase: str, round_: int, step: int) -> None:
        """Drops a phase's records at and after `step`: a restart from there writes them again."""

        def stays(line: bytes) -> bool:
            record = json.loads(line)
            return (record["phase"], record["round"]) != (phase, round_) or record["step"] < step

        if self._workdir is not None:
            self._drop_unless(stays)

    def _drop_unless(self, stays: Callable[[bytes], bool]) -> list[bytes]:
        """Removes lines from metrics.jsonl, and returns them."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        kept: list[bytes] = []
        dropped: list[bytes] = []
        for line in lines:
            (kept if stays(line) else dropped).append(line)
        if dropped:
            write_text(self._path, b"".join(kept).decode())
        return dropped

    def close(self) -> None:
        """Ends the log; what was written stays."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _write_events(self, values: Mapping[str, float], step: int) -> None:
        # Imported with the first step: it imports PyTorch where that is installed, for seconds.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        # Not SummaryWriter: its thread dies where the disk is full, and then its queue blocks.
        if self._events is None:
            directory = self._workdir / "tensorboard"
            directory.mkdir(exist_ok=True)
            self._events = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        event = Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.extend(scalar(name, value).value)
        self._events.write_event(event)
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self._events.flush()
            self._flushed = time.monotonic()


def _is_whole(line: bytes) -> bool:
    """Whether a line is a record, as `write` makes them."""
    try:
        record = json.loads(line.decode())
        return line.endswith(b"\n") and {"phase", "round", "step"} <= record.keys()
    except (ValueError, AttributeError, RecursionError):
        return False


def _start_wandb(workdir: pathlib.Path, project: str, address: str) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            "log.wandb is set, but wandb is not installed: pip install wandb, or leave it empty"
        ) from None
    name = hash_json(address)[:16]  # A restart goes on with the same run.
    return wandb.init(project=project, dir=str(workdir), id=name, resume="allow")
