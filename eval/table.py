"""Does expansion pay? The reference table, over collections and seeds:

    python -m eval.table --config=configs/table.py --data=DIR,DIR,pydoc --seeds=0,1,2 --workdir=OUT

A cell is a collection and a seed: a run of `train.joint --config=configs/table.py:DIR`, a program
of its own, in OUT/cells/COLLECTION/seed-S, begun where it is missing and gone on with where it was
stopped. DIR is a directory in BEIR layout, or a name of configs/public.py, which is downloaded;
`pydoc` stands for the docstrings of packages. With --config.data.tests each run is tested on
further collections, too, which the table calls COLLECTION-to-TEST. OUT gets
results.json and results.md, .tex, .csv and .html: means over seeds with intervals over queries,
tests against the rows without expansions, costs, and the queries that gained and lost most. What
the table needs of a cell is kept in OUT/cells/COLLECTION-seed-S.json.gz, so that a run's directory
may be removed; --pack=DIR puts these files into DIR, too, and --cells=DIR takes them from there.
Exit status 2 where a cell failed: the others are made, and the table is of what there is.
"""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from eval.cells import (
    SUFFIX,
    Cell,
    cell_of_run,
    measured,
    other_settings,
    read_cell,
    without_places,
    write_cell,
)
from expandr_jax.config import read_config
from expandr_jax.data.benchmarks import find_benchmarks
from expandr_jax.data.places import find_collections
from expandr_jax.errors import UserError
from expandr_jax.report.grid_pages import write_grid
from expandr_jax.runtime.formats import read_record
from expandr_jax.runtime.progress import Reporter, plain_console
from expandr_jax.runtime.revision import revision
from expandr_jax.runtime.run import LOCK
from train.launch import config_arguments, config_of, define_config, define_workdir, launch

PROGRAM = "train.joint"
HARVEST = "pydoc"  # Stands for a collection that no directory holds.
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_SAVE = 300  # After SIGTERM, which a run obeys when its step is done.


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A cell of the table, there or not.

    Attributes:
        collection, seed: Which it is.
        path: The file or directory that its config reads; "": none that is there already.
        file: What --config is for its run.
        overrides: Setting -> value, beside those of the file.
        config: Its whole config, but for where things lie.
        directory: Where its run is made, if it has to be.
        test: The collection of data.tests that it is about; "": the one that its run trains on.
    """

    collection: str
    seed: int
    path: str
    file: str
    overrides: Mapping[str, Any]
    config: Mapping[str, Any]
    directory: pathlib.Path
    test: str = ""

    @property
    def name(self) -> str:
        """As people are told."""
        return f"{self.collection}, seed {self.seed}"

    @property
    def packed(self) -> pathlib.Path:
        """What the table needs of it."""
        cells = self.directory.parent.parent
        return cells / f"{self.collection}-seed-{self.seed}{SUFFIX}"

    @property
    def log(self) -> pathlib.Path:
        """What its run printed."""
        return self.directory.with_suffix(".log")

    @property
    def command(self) -> list[str]:
        """What makes it."""
        settings = config_arguments({**self.overrides, "seed": self.seed})
        start = [sys.executable, "-m", PROGRAM, f"--config={self.file}", *settings]
        return [*start, f"--workdir={self.directory}"]


def read_seeds(texts: Sequence[str]) -> list[int]:
    """The seeds; UserError of what are no different whole numbers."""
    seeds = [int(text) for text in texts if text.isdecimal()]
    if not seeds or len({*seeds}) < len(texts):
        raise UserError(f"--seeds={','.join(texts)}: expected different whole numbers, as 0,1,2")
    return seeds


def wanted_cells(
    file: str, overrides: Mapping[str, Any], data: Sequence[str], seeds: Sequence[int],
    workdir: pathlib.Path,
) -> list[Wanted]:  # fmt: skip
    """The cells of the table, collection by collection.

    Raises:
        UserError: A name stands for two, or the config is wrong.
    """
    if ":" in file:
        raise UserError(f"--config={file}: expected a file alone; --data names the collections")
    if "seed" in overrides:
        raise UserError("--config.seed: expected --seeds=0,1,2")
    found: dict[str, str] = {}
    wanted = []
    for path in data:
        name = pathlib.Path(path).resolve().name.removesuffix(".zip") if path != HARVEST else path
        if found.setdefault(name, path) != path or data.count(path) > 1:
            raise UserError(f"--data: two collections are called {name!r}; rename one")
        of_file = f"{file}:{path}"
        for seed in seeds:
            try:
                config = read_config(config_of(of_file, {**overrides, "seed": seed}))
            except UserError as error:
                raise UserError(f"--config={of_file}: {error}") from None
            settings = without_places(dataclasses.asdict(config))
            directory = workdir / "cells" / name / f"seed-{seed}"
            run = seed, config.data.path, of_file, overrides, settings, directory
            wanted.append(Wanted(name, *run))
            tests = names_of(config.data.tests)
            wanted += (Wanted(f"{name}-to-{t.replace('/', '-')}", *run, t) for t in tests)
    names = [one.name for one in wanted]
    if twice := next((one for one in wanted if names.count(one.name) > 1), None):
        raise UserError(
            f"--data and data.tests: two collections are called {twice.collection!r}; rename one"
        )
    return wanted


def names_of(paths: Sequence[str]) -> list[str]:
    """Names of the collections at some paths, which need not be there where cells are given."""
    return [name for path in paths for name in _names_at(path)]


def _names_at(path: str) -> list[str]:
    with contextlib.suppress(UserError):
        return list(find_collections(path))
    return [pathlib.Path(path).name.removesuffix(".zip")]


def given_cells(directories: Sequence[str]) -> dict[tuple[str, int], tuple[pathlib.Path, Cell]]:
    """(Collection, seed) -> file and cell, of what lies in some directories.

    Raises:
        UserError: There is none, two are of the same, or one cannot be read.
    """
    found: dict[tuple[str, int], tuple[pathlib.Path, Cell]] = {}
    for directory in directories:
        found_there = pathlib.Path(directory).glob("*-seed-*.json*")
        paths = sorted(path for path in found_there if not path.name.startswith("."))
        if not paths:
            raise UserError(f"--cells={directory}: holds no NAME-seed-S{SUFFIX}")
        for path in paths:
            cell = read_cell(path)
            other, _ = found.setdefault((cell.collection, cell.seed), (path, cell))
            if other != path:
                raise UserError(f"{path}: {cell.name} is in {other}, too; remove one")
    return found


def collections_of(given: Iterable[tuple[str, int]]) -> list[str]:
    """Whose runs given cells are of: a further test's are of the collection before its name."""
    names = dict.fromkeys(name for name, _ in given)
    return [n for n in names if not any(n.startswith(f"{name}-to-") for name in names)]


def check_given(
    wanted: Sequence[Wanted],
    given: Mapping[tuple[str, int], tuple[pathlib.Path, Cell]],
    say: Callable[[str], None],
) -> dict[tuple[str, int], Cell]:
    """The given cells that are wanted; says which were made by another revision.

    Raises:
        UserError: Some were made with another config; it names each.
    """
    taken, others = {}, []
    for one in wanted:
        if (one.collection, one.seed) not in given:
            continue
        path, cell = given[one.collection, one.seed]
        if changes := other_settings(cell.config, one.config):
            name, theirs, ours = changes[0]
            others.append(f"{path}: {name} is {theirs!r}, in {one.file} {ours!r}")
        if cell.revision != revision():
            say(f"{path}: was made by revision {cell.revision}; this is {revision()}")
        taken[one.collection, one.seed] = cell
    if others:
        raise UserError(f"{'; '.join(others)}; expected cells made with the same config")
    return taken


def kept_cell(wanted: Wanted, say: Callable[[str], None]) -> Cell | None:
    """A cell that the workdir has, packed or as a finished run; None where it has to be made.

    Raises:
        UserError: The packed one is damaged, and there is no run to make it of.
    """
    try:
        if wanted.packed.exists():
            cell = read_cell(wanted.packed)
            if not other_settings(cell.config, wanted.config):
                return cell
    except UserError as error:
        if not wanted.directory.exists():
            raise
        say(f"{error}; it is made again of its run")
    return finished_cell(wanted, say)


def finished_cell(wanted: Wanted, say: Callable[[str], None]) -> Cell | None:
    """The cell of its run, which is packed, too; None where the run is not finished or damaged."""
    try:
        return _finished_cell(wanted)
    except UserError as error:
        say(f"{wanted.name}: {error}")
        return None


def _finished_cell(wanted: Wanted) -> Cell | None:
    made = [wanted.directory / name for name in ("config.json", "results.json", "report.html")]
    if not all(path.exists() for path in made):
        return None
    if other_settings(without_places(read_record(made[0])), wanted.config):
        return None
    if wanted.test and not (wanted.directory / "tests" / wanted.test / "results.json").exists():
        return None
    cell = cell_of_run(wanted.directory, wanted.collection, wanted.test)
    if not set(wanted.config["evaluation"]["systems"]) <= set(cell.values):
        return None  # Rows were added, and the run was stopped before it had them.
    write_cell(wanted.packed, cell, most=math.inf)
    return read_cell(wanted.packed)


def make_cell(wanted: Wanted, reporter: Reporter) -> Cell | None:
    """Runs or goes on with the run of a cell; None, with a line that says why, where it failed."""
    wait_for_others(wanted, reporter)
    wanted.directory.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(wanted.log, "a", encoding="utf-8") as log, _running(wanted, log) as process:
        shown = set(_phases(wanted.directory))  # Those of an earlier start.
        while process.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            for phase in _phases(wanted.directory):
                if phase not in shown:
                    shown.add(phase)
                    reporter.say(f"{wanted.name}: {phase}, {time.monotonic() - start:.0f} s")
    cell = None if process.returncode else finished_cell(wanted, reporter.say)
    if cell is None:
        reporter.say(
            f"{wanted.name}: failed, exit status {process.returncode}: {_last_word(wanted.log)}; "
            f"all of it is in {wanted.log}"
        )
    return cell


def wait_for_others(wanted: Wanted, reporter: Reporter) -> None:
    """Waits while another process is making the cell: one whose table was killed goes on alone."""
    path, told = wanted.directory / LOCK, False
    while path.exists():
        with open(path, "a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if not told:
            reporter.say(f"{wanted.name}: another process is making it; waiting for that")
        told = True
        time.sleep(SECONDS_BETWEEN_LOOKS)


@contextlib.contextmanager
def _running(wanted: Wanted, log: Any) -> Iterator[subprocess.Popen]:
    """The run of a cell, which has ended, having saved what it had, when this is left."""
    # Programs that one cell has compiled are there for the next.
    compiled = str(wanted.packed.parent.absolute() / "compiled")
    environment = {"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ}
    print("$", *wanted.command[1:], file=log, flush=True)
    process = subprocess.Popen(
        wanted.command, env=environment, stdout=log, stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_SAVE)
            process.kill()
        process.wait()


def _phases(directory: pathlib.Path) -> list[str]:
    """The phases of a run that are over."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        timings = json.loads((directory / "timings.json").read_bytes())
        return [row["phase"] for row in timings["phases"]]
    return []


def _last_word(log: pathlib.Path) -> str:
    """The error that a log ends with, or else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
    return next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1])


def make_table(
    wanted: Sequence[Wanted], given: Mapping[tuple[str, int], Cell], reporter: Reporter
) -> tuple[list[Cell], list[Wanted]]:
    """Makes the cells that are missing; returns all that there are, and those that failed."""
    cells = dict(given)
    for one in wanted:
        key = one.collection, one.seed
        if key not in cells and (cell := kept_cell(one, reporter.say)) is not None:
            cells[key] = cell
    missing = [one for one in wanted if (one.collection, one.seed) not in cells]
    for path in dict.fromkeys(one.path for one in missing if one.path):
        find_benchmarks([path])  # Before hours of work on the others.
    failed = []
    with reporter.progress("cells", len(wanted), len(cells)) as advance:
        for number, one in enumerate(missing, start=1):
            reporter.say(f"{one.name}: {number} of {len(missing)} to make; log {one.log}")
            # The run of a further test is that of the cell before it.
            tried = any(one.directory == other.directory for other in failed)
            cell = (one.test and finished_cell(one, reporter.say)) or None
            if cell is None and not tried:
                cell = make_cell(one, reporter)
            if cell is None:
                failed.append(one)
            else:
                cells[one.collection, one.seed] = cell
            advance(1)
    order = [(one.collection, one.seed) for one in wanted]
    return [cells[key] for key in order if key in cells], failed


def main(_: Any) -> None:
    settings, console = flags.FLAGS, plain_console(soft_wrap=True)
    jax.config.update("jax_platforms", "cpu")  # Chips are for the runs.
    flag, reporter = settings["config"], Reporter(console)
    seeds = read_seeds(settings.seeds)
    given = given_cells(settings.cells)
    data = settings.data or collections_of(given)
    if not data:
        raise UserError("--data is missing: --data=DIR,DIR, directories in BEIR layout, or pydoc")
    workdir = pathlib.Path(settings.workdir)
    wanted = wanted_cells(flag.config_filename, flag.override_values, data, seeds, workdir)
    taken = check_given(wanted, given, reporter.say)
    cells, failed = make_table(wanted, taken, reporter)
    if cells:
        missing = [one.name for one in failed]
        console.print(write_grid(workdir, measured(cells), missing))
        console.print(f"page: {workdir / 'results.html'}")
        for cell in cells if settings.pack else ():
            cell = cell if settings.texts else cell.without_texts()
            write_cell(pathlib.Path(settings.pack) / f"{cell.name}{SUFFIX}", cell)
    if failed:
        names = "; ".join(f"{one.name} (log: {one.log})" for one in failed)
        raise UserError(f"{len(failed)} of {len(wanted)} cells failed: {names}")


def define_flags() -> None:
    define_config("configs/table.py")
    define_workdir()
    flags.DEFINE_list("data", [], "Directories in BEIR layout, or names of configs/public.py, to "
                      "download; pydoc: docstrings. None: the collections of --cells.")  # fmt: skip
    flags.DEFINE_list("seeds", ["0", "1", "2"], "One training of each collection for each.")
    flags.DEFINE_list("cells", [], "Directories of cells that were made before and packed.")
    flags.DEFINE_string("pack", None, "Where the table's cells are put, a small file each.")
    flags.DEFINE_bool("texts", True, "Whether these hold queries and passages, which --notexts "
                      "leaves out where they may not be handed on.")  # fmt: skip


if __name__ == "__main__":
    launch(main, define_flags, resumes=True)
