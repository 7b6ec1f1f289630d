"""A run's directory: its config, metrics, timings and progress; where the file contract is kept."""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from rich.console import Console

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.files.records import hash_json, write_json
from expandr_jax.runtime import processes, resources
from expandr_jax.runtime.additions import grown_settings, keep_grown
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.runtime.checksums import Checksums
from expandr_jax.runtime.formats import FORMAT, check_goes_on, kept_as_before, translated
from expandr_jax.runtime.host_memory import release_memory
from expandr_jax.runtime.metrics_log import MetricsLog
from expandr_jax.runtime.mirror import Mirror, scratch
from expandr_jax.runtime.progress import Reporter
from expandr_jax.runtime.revision import revision
from expandr_jax.runtime.stage import TrainedStage
from expandr_jax.runtime.telemetry import Profile, TrainingLog
from expandr_jax.runtime.timings import add_phase, add_search, peak_memory

LIBRARIES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy",
    "scipy", "scann", "ir-measures", "bm25s", "tensorflow-datasets", "grain",
)  # fmt: skip
CHECKPOINT = "The last good checkpoint"
LOCK = ".lock"
WRITTEN = (
    "data", "distilled", "evaluation", "export", "metrics.jsonl", "qrels.trec", "report.html",
    "results.json", "round-0", "runs", "tensorboard", "timings.json", "work",
)  # fmt: skip


class Run:
    """One workdir, opened by the processes of a run, of which the first one writes to it.

    Args:
        workdir: Made if absent; a run that is there already is continued. gs://BUCKET/DIRECTORY:
            in a bucket; see `mirror`.
        config: A `Config`; must be the one the workdir was made with.
        console: Where progress goes.
        grow: Prepares the files of a run for settings that have grown since it was last started,
            before config.json has them; is told their values before, by name. Process 0 calls it.

    Attributes:
        address: The workdir, as its user knows it.
        workdir: The directory that the run works in; of one in a bucket, this process's own.
        processes: This process among those of the run.
        last_good: The latest checkpoint, for messages.

    Raises:
        UserError: If the directory cannot be written, is in use, holds another config's run or
            files that are no run's, or is not the same one for all processes.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: Any,
        console: Console,
        grow: Callable[["Run", Mapping[str, Any]], None] = lambda run, grown: None,
    ):
        self.config = config
        self._values = json.loads(json.dumps(dataclasses.asdict(config)))
        self.console = console
        self.reporter = Reporter(console)
        self.processes = processes.current()
        self.processes.files = processes.SharedFiles()
        self._lock: Any = None
        if is_bucket(workdir):
            self.address = str(workdir).rstrip("/")
            self.workdir = scratch(self.address, self.processes.suffix)
            self._take(self.workdir)
            own = self.processes
            mirror = Mirror(self.address, self.workdir, own.index, own.count, self.reporter.say)
            own.main_first(mirror.start)
            own.files = mirror
        else:
            self.workdir = pathlib.Path(os.path.abspath(workdir))
            self.address = str(self.workdir)
            self._check_inputs()
            self.processes.once(lambda: self._take(workdir))
        self.processes.main_first(self._check_config)
        if jax.config.jax_compilation_cache_dir is None:  # A restart finds its programs compiled.
            jax.config.update("jax_compilation_cache_dir", str(self.path("work", "compiled")))
        self.checksums = Checksums(self.workdir, self.reporter.say)
        written = self.workdir if self.processes.is_main else None
        self.metrics = MetricsLog(written, config.log.wandb, self.address)
        if self.metrics.dropped:
            self.reporter.say(f"metrics.jsonl: {self.metrics.dropped} damaged lines were dropped")
        self.last_good = "there is none yet"
        self._seconds_inside = 0.0  # Seconds of phases that ran within the present one.
        if self._grown:
            self.processes.once(lambda: self._grow(grow))

    def path(self, *parts: str) -> pathlib.Path:
        """A path under the workdir."""
        return self.workdir.joinpath(*parts)

    def where(self, path: str | os.PathLike) -> str:
        """A path under the workdir, as its user knows it."""
        inside = pathlib.Path(path).relative_to(self.workdir).as_posix()
        return self.address if inside == "." else f"{self.address}/{inside}"

    def checkpoints(self, name: str) -> epath.Path:
        """Where the checkpoints of this name are; in the bucket, if that is where the run is."""
        return epath.Path(self.address) / "checkpoints" / name

    def read_json(self, path: pathlib.Path) -> dict[str, Any]:
        """An object that the run wrote; UserError if it is damaged."""
        try:
            return dict(json.loads(path.read_bytes().decode()))
        except (ValueError, TypeError):
            raise UserError(f"{self.where(path)}: is damaged; use a new --workdir") from None

    def noted(self, path: pathlib.Path, record: Mapping[str, Any]) -> dict[str, Any]:
        """What the run wrote there when it began, which is now where there is nothing."""

        def note() -> dict[str, Any]:
            if not path.exists():
                write_json(path, record)
            return self.read_json(path)

        return self.processes.main_first(note)

    def check_source(
        self, directory: pathlib.Path, source: Mapping[str, Any], place: Any, unread: Container[str]
    ) -> None:
        """Refuses data other than a directory was begun with: its data/SOURCE.json says which.

        Args:
            directory: Where results of them go, under the workdir.
            source: What they are, as `Benchmark.source` has it.
            place: Where they are read.
            unread: Files of theirs that do not count, though older runs noted them.
        """
        noted = self.noted(directory / "data" / "SOURCE.json", source)
        files = {n: hash_ for n, hash_ in noted.get("files", {}).items() if n not in unread}
        if {**noted, "files": files} != source:
            raise UserError(
                f"{self.where(directory)}: was made with other data than {place} has now, or for "
                "another split; put back what was there, or use a new --workdir"
            )

    def close(self) -> None:
        """Ends logging and lets other runs have the workdir."""
        self.metrics.close()
        self.processes.files.push()
        if self._lock is not None:
            self._lock.close()

    def _take(self, workdir: str | os.PathLike) -> None:
        """Makes the workdir, and keeps other runs out of it."""
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.workdir / LOCK, "w")  # noqa: SIM115 (held for the run's life)
        except FileExistsError:
            raise UserError(f"{workdir}: is a file; expected a directory") from None
        except OSError as error:
            raise UserError(f"{workdir}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{workdir}: another process is running in this workdir") from None

    def _check_config(self) -> None:
        path = self.path("config.json")
        # Process 0 has made the directory; another one may be looking elsewhere.
        there = {file.name for file in self.workdir.iterdir()} if self.workdir.exists() else set()
        if path.name not in there:
            self._check_new(path, there)
            self._write_config(path)
        elif self.processes.is_main and there <= {path.name, LOCK} and _is_record(path):
            # The start before this one wrote nothing else: it may have had a mistyped path.
            self._write_config(path)
        try:
            record = json.loads(path.read_bytes())
            before = translated(record)
            check_goes_on(self.address, record)
            self._keep_chats(before["generator"])
            for setting, value in kept_as_before(record["config"]).items():
                self._keep_old(*setting.split("."), value)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            raise UserError(
                f"{self.where(path)}: is damaged; restore it or use a new --workdir"
            ) from None
        self._grown = grown_settings(self.address, before, self._values)

    def _keep_old(self, section: str, name: str, value: Any) -> None:
        self._values[section][name] = value
        changed = dataclasses.replace(getattr(self.config, section), **{name: value})
        self.config = dataclasses.replace(self.config, **{section: changed})

    def _grow(self, grow: Callable[["Run", Mapping[str, Any]], None]) -> None:
        for name, old in self._grown.items():
            self.reporter.say(f"{name} was {old!r}: what is new of it is added to this run")
        grow(self, self._grown)
        keep_grown(self.path("config.json"), self._grown, self._values)

    def _keep_chats(self, before: Mapping[str, Any]) -> None:
        """Lets prompts be what they were at the first start.

        Their day is that one's; older runs, which had no such settings, said nothing of thinking.
        """
        own = self._values["generator"]
        own["today"] = own["today"] or before["today"]
        if before["thinking"] is None:
            own["thinking"] = None
        chats = {name: own[name] for name in ("today", "thinking")}
        generator = dataclasses.replace(self.config.generator, **chats)
        self.config = dataclasses.replace(self.config, generator=generator)

    def _check_new(self, path: pathlib.Path, there: set[str]) -> None:
        """Refuses to begin where other processes do not look, or among files that it would take."""
        if not self.processes.is_main:
            raise UserError(
                f"{self.address}: holds nothing of what process 0 wrote; expected a directory "
                "that all processes share"
            )
        if "checkpoints" in there or self.path("work/seals.json").exists():
            raise UserError(
                f"{self.where(path)}: is gone, and nobody can tell whether this run was made "
                "with the same config; restore it or use a new --workdir"
            )
        # Empty directories have nothing to lose; a bucket's scratch may keep some.
        if others := sorted(n for n in there.intersection(WRITTEN) if _has_files(self.path(n))):
            raise UserError(
                f"{self.address}: holds {others[0]}, which a run would write over, and no run; "
                "use a new --workdir"
            )

    def _check_inputs(self) -> None:
        """Refuses what is to be read from a place where the run's own files go."""
        for where, value in jax.tree_util.tree_leaves_with_path(self._values):
            if not isinstance(value, str):
                continue
            name = ".".join(part.key for part in where if hasattr(part, "key"))
            path = pathlib.Path(os.path.abspath(value))
            if path.is_relative_to(self.workdir) and path != self.workdir:
                top = path.relative_to(self.workdir).parts[0]
                if top in WRITTEN:
                    raise UserError(
                        f"{name} is {value}, where a run in this workdir writes over {top}; "
                        "use another --workdir"
                    )

    def _write_config(self, path: pathlib.Path) -> None:
        versions = {}
        for name in LIBRARIES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        device = jax.devices()[0]
        self._values["generator"]["today"] = (
            self._values["generator"]["today"] or datetime.date.today().isoformat()
        )
        record = {
            "format": FORMAT,
            "config": self._values,
            "seed": self._values["seed"],
            "revision": revision(),
            "versions": {"python": platform.python_version(), **versions},
            "device": {"kind": device.device_kind, "platform": device.platform,
                       "count": jax.device_count()},
        }  # fmt: skip
        write_json(path, record)

    def check_models(self, hashes: Mapping[str, str]) -> None:
        """Refuses models and tokenizers other than those that the run began with.

        `hashes` are those of their contents, by the setting that names them. Those of models that
        no start before has loaded are kept.
        """
        path, hashes = self.path("work", "models.json"), dict(hashes)

        def write(models: Mapping[str, str]) -> None:
            write_json(path, {"models": models, "sha256": hash_json(models)})

        def check() -> None:
            if not path.exists():
                write(hashes)
                return
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
                before = dict(record["models"])
                if record["sha256"] != hash_json(before):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{path}: is damaged, so nobody can tell whether the models are still the "
                    "same; remove it if they are"
                ) from None
            for name, value in hashes.items():
                if before.get(name, value) != value:
                    raise UserError(
                        f"{name}: is not what this run began with; put that back, or use a new "
                        "--workdir"
                    )
            if not hashes.keys() <= before.keys():
                write(before | hashes)

        self.processes.main_first(check)

    def training_log(self, phase: str, round_: int) -> TrainingLog:
        """Where a phase of training is recorded, by its name and round in metrics.jsonl."""
        traces = self.path("profile", f"{phase}-round-{round_}")
        return TrainingLog(
            phase,
            round_,
            metrics=self.metrics,
            reporter=self.reporter,
            processes=self.processes,
            profile=Profile(traces, self.config.log.profile_steps),
            peak_flops=self.config.log.peak_flops,
            saved=functools.partial(setattr, self, "last_good"),
            stopped=self.close,
        )

    def trained_stage(
        self, name: str, round_: int = 0, *, phase: str = "", keep: int = 0
    ) -> TrainedStage:
        """Where a stage of training is recorded and kept.

        Args:
            name: What its checkpoints and its journal of dev are called.
            round_: The round that it is of.
            phase: What metrics call it; "": as the checkpoints are called.
            keep: How many checkpoints stay; 0: as the config has it.
        """
        journal = self.path("work", f"round-{round_}", f"{name}-dev.jsonl")
        log = self.training_log(phase or name, round_)
        return TrainedStage(log, self.checkpoints(name), journal, keep or self.config.keep)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times a phase and watches its memory; both add up over restarts in timings.json.

        The time of a phase within another counts for the inner one alone.
        """
        with resources.stage(name, self.workdir), self._timed(name):
            yield

    @contextlib.contextmanager
    def search(self, system: str, queries: int) -> Iterator[None]:
        """Times how a system ranks so many queries: "searches" in timings.json, within its phase.

        What it rests on and was ranked before is not in it, nor the vectors that it shares.
        """
        start = time.perf_counter()
        yield
        seconds = round(time.perf_counter() - start, 4)
        if self.processes.is_main:
            add_search(self.path("timings.json"), system, queries, seconds)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        self.console.print(name, style="bold")
        outside, self._seconds_inside = self._seconds_inside, 0.0
        start = time.perf_counter()
        with peak_memory() as peak:
            try:
                yield
            except NotFiniteError as error:
                if CHECKPOINT in str(error):
                    raise
                raise NotFiniteError(f"{error}. {CHECKPOINT}: {self.last_good}") from None
        release_memory()
        whole = time.perf_counter() - start
        seconds = whole - self._seconds_inside
        self._seconds_inside = outside + whole
        if self.processes.is_main:
            add_phase(self.path("timings.json"), name, seconds, peak())


def _has_files(path: pathlib.Path) -> bool:
    return path.is_file() or any(inside.is_file() for inside in path.rglob("*"))


def _is_record(path: pathlib.Path) -> bool:
    """Whether a config.json is a run's: not a model's, nor damaged."""
    with contextlib.suppress(ValueError, OSError, KeyError, TypeError):
        return set(json.loads(path.read_text())) >= {"config", "versions"}
    return False
