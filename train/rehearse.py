"""Says whether a run will fit its hosts at its full size, from a few runs that are much smaller.

    python -m train.rehearse --config=configs/llama3_8b_anchordr.py --processes=4 --out=FILE

Each run is `train.joint` as it is, by several processes on this machine's processor, with a
synthetic collection and random models of few, narrow layers; the vocabulary, the width of vectors,
the types and the limits of texts are the config's, the counts a share of its own. Of each stage it
measures the peak memory of each process, the largest buffer on a device, disk, programs compiled
and the seconds outside them, fits how each grows, and says what it comes to at the full counts.
Exit status 1 where a stage will not fit or grows worse than linearly, 2 for a mistake in what was
asked.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config, with_settings
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.pair import OF_ONE_PROCESS
from expandr_jax.planning.growth import FEWEST_SCALES
from expandr_jax.planning.narrow import count_words, write_narrow_generator, write_narrow_retriever
from expandr_jax.planning.synthetic import Counts, write_collection
from expandr_jax.planning.usage import show_usage, usage_misfits, usage_rows
from expandr_jax.ranking.systems import AGAIN
from expandr_jax.report.tables import wide_console
from expandr_jax.runtime.chips import GIB
from expandr_jax.runtime.progress import plain_console
from train.counts import define_counts, told_counts
from train.launch import define_config, end_by_misfits, launch, output_file

REHEARSED = "train.rehearsed"
SECONDS_BETWEEN_LOOKS = 0.5
LINES_SHOWN = 15  # The end of what a process printed that failed.
# On-policy steps, which are as large at every scale. The first compiles its programs.
POLICY_STEPS = 3
MOST_EPOCHS = 1.0  # How long a training lasts.
STEP_PARTS = ("sampling", "encoding", "search", "update")  # As metrics.jsonl names such a step's.


def check_counts(config: Config, counts: Counts, scales: Sequence[float]) -> None:
    """Refuses scales that no fit can be made of, or at which a stage has next to nothing to do."""
    if len(scales) < FEWEST_SCALES or any(a >= b for a, b in itertools.pairwise(scales)):
        raise UserError(
            f"--scale={','.join(f'{s:g}' for s in scales)}: expected {FEWEST_SCALES} or more, "
            "rising"
        )
    least = {
        "documents": 64,
        "retriever_train": config.contrastive.batch_size,
        "generator_train": max(8, config.learned.batch_size),
        "dev": 2,
        "test": 2,
    }
    if scales[0] <= 0:
        raise UserError(f"--scale={scales[0]:g}: expected a share above 0")
    small = dataclasses.asdict(counts.at(scales[0]))
    for name, number in small.items():
        if number < least[name]:
            needed = least[name] / getattr(counts, name)
            raise UserError(
                f"--scale={scales[0]:g}: that is {number} of {getattr(counts, name)} {name}, and a "
                f"stage needs {least[name]}; expected {needed:.2g} or more, or a larger --{name}"
            )


def rehearse(
    config: Mapping[str, Any] | Config,
    counts: Counts,
    scales: Sequence[float],
    count: int,
    limits: Mapping[str, float | None],
    console: Console,
    directory: pathlib.Path,
) -> list[dict[str, Any]]:
    """Runs a config's run at several scales.

    Args:
        config: The whole config.
        counts: What its run has at scale 1.
        scales: Shares of that, rising.
        count: Processes.
        limits: Measure -> the most that a process, or the workdir, may have; None: any.
        console: Where progress is shown.
        directory: An empty one, for models, collections and workdirs.

    Returns:
        The rows of --out.

    Raises:
        UserError: A run ended before its end; it says how.
    """
    config = read_config(config)
    again = [n for n in config.evaluation.systems if {*AGAIN} & {*n.split(":")}]
    if again:
        raise UserError(
            f"evaluation.systems: {again[0]} reads documents again, which is not rehearsed; leave "
            "it out with --config.evaluation.systems"
        )
    check_counts(config, counts, scales)
    console.print("models: one narrow layer each, and random")
    write_narrow_retriever(directory / "retriever", config)
    write_narrow_generator(directory / "generator", config)
    # Each compiles its own programs, which takes memory: else the first alone would hold that.
    usage = [
        _run(config, counts.at(scale), count, console, directory, f"scale {scale:g}")
        for scale in scales
    ]
    return usage_rows(scales, usage, limits)


def _run(
    config: Config,
    counts: Counts,
    count: int,
    console: Console,
    directory: pathlib.Path,
    what: str,
) -> list[dict[str, dict[str, float]]]:
    """Runs the config once; returns what each process measured, by stage."""
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = pathlib.Path(name)
        query = max(4, min(config.dpo.prompt_length, max(config.generator.prompt_buckets)) // 2)
        write_collection(
            folder / "collection",
            counts,
            words=count_words(config),
            document=config.retriever.max_length - 2,
            query=query,
        )
        settings = with_settings(config, _changes(config, counts, directory, folder))
        write_json(folder / "config.json", dataclasses.asdict(settings))
        paths = [folder / f"usage-{i}.json" for i in range(count)]
        address = f"127.0.0.1:{_free_port()}"
        with contextlib.ExitStack() as stack:
            running = [
                stack.enter_context(_process(config, folder, paths, i, address))
                for i in range(count)
            ]
            _watch(running, paths[0], folder, console, what)
        usage = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        phase = config.step_b_kind.phase
        usage[0] |= parts_of_a_step(folder / "run" / "metrics.jsonl", phase)
        return usage


def parts_of_a_step(metrics: pathlib.Path, phase: str) -> dict[str, dict[str, float]]:
    """Seconds of the parts of such a phase's steps on-policy, as stages; {}: there are none."""
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    steps = [line for line in lines if line["phase"] == phase]
    return {
        f"{phase}, a step's {part}": {"seconds": statistics.mean(seconds)}
        for part in STEP_PARTS
        if (seconds := [row[f"{part}_seconds"] for row in steps[1:] if f"{part}_seconds" in row])
    }


def _changes(
    config: Config, counts: Counts, models: pathlib.Path, folder: pathlib.Path
) -> dict[str, Any]:
    """The settings in which a rehearsal differs from its config."""
    trained = counts.retriever_train + counts.generator_train
    return {
        "data.kind": "beir",
        "data.path": str(folder / "collection"),
        "data.url": "",
        "data.sha256": "",
        "data.tests": (),  # The run's own collection is as large as the largest.
        "data.shares.retriever_train": counts.retriever_train / trained,
        "data.shares.generator_train": counts.generator_train / trained,
        **{
            f"data.max_{name}": getattr(counts, name)
            for name in ("retriever_train", "generator_train", "dev", "test")
        },
        "retriever.source": str(models / "retriever"),
        "retriever.sha256": None,
        "retriever.pooling": "",
        "generator.source": str(models / "generator"),
        "generator.sha256": None,
        "generator.server.url": "",
        # Another pass over the same examples takes nothing but time.
        "contrastive.epochs": min(config.contrastive.epochs, MOST_EPOCHS),
        "dpo.epochs": min(config.dpo.epochs, MOST_EPOCHS),
        "grpo.steps": min(config.grpo.steps, POLICY_STEPS),
        # What a random model writes says nothing of a collapse.
        "grpo.watch_steps": POLICY_STEPS + 1,
        "log.wandb": "",
        "log.profile_steps": 0,
    }


@contextlib.contextmanager
def _process(
    config: Config,
    folder: pathlib.Path,
    paths: Sequence[pathlib.Path],
    index: int,
    address: str,
) -> Iterator[subprocess.Popen]:
    """One process of a run, which is ended at the latest when this is left."""
    command = [
        *(sys.executable, "-m", REHEARSED, f"--workdir={folder / 'run'}"),
        f"--settings={folder / 'config.json'}",
        f"--usage={paths[index]}",
    ]
    if len(paths) > 1:
        command += [f"--coordinator={address}", f"--processes={len(paths)}", f"--process={index}"]
    scratch = folder / f"scratch-{index}"
    scratch.mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(scratch),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices_of_a_process(config)}",
    }
    with open(folder / f"printed-{index}.txt", "w", encoding="utf-8") as printed:
        process = subprocess.Popen(
            command, env=environment, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def devices_of_a_process(config: Config) -> int:
    """The fewest devices that the meshes within one process need."""
    fixed = []
    for phase in OF_ONE_PROCESS:
        mesh = config.mesh
        sizes = getattr(mesh, phase) or (mesh.data, mesh.fsdp, mesh.tensor)
        fixed.append(math.prod(size for size in sizes if size > 0))
    return math.lcm(*fixed)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _watch(
    running: Sequence[subprocess.Popen],
    usage: pathlib.Path,
    folder: pathlib.Path,
    console: Console,
    what: str,
) -> None:
    """Shows which stages are over until all processes have ended.

    Raises:
        UserError: One of them failed.
    """
    shown: set[str] = set()
    start = time.monotonic()
    while any(process.poll() is None for process in running):
        time.sleep(SECONDS_BETWEEN_LOOKS)
        for stage in json.loads(usage.read_text(encoding="utf-8")) if usage.exists() else ():
            if stage not in shown:
                shown.add(stage)
                console.print(f"{what}: {stage}, {time.monotonic() - start:.0f} s", soft_wrap=True)
        if any(process.poll() for process in running):
            break
    for index, process in enumerate(running):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        if process.returncode:
            lines = (folder / f"printed-{index}.txt").read_text(errors="replace").splitlines()
            console.print("\n".join(lines[-LINES_SHOWN:]), soft_wrap=True)
            raise UserError(f"{what}: process {index} ended with {process.returncode}; see above")


def main(_: Any) -> None:
    console, values = wide_console(), flags.FLAGS
    config = read_config(values.config)
    jax.config.update("jax_platforms", "cpu")  # Chips are for others.
    out = output_file(values.out)
    try:
        scales = [float(text) for text in values.scale]
    except ValueError:
        raise UserError(f"--scale={','.join(values.scale)}: expected numbers") from None
    counts = told_counts(config)
    limits = {
        "memory_bytes": values.host_memory * GIB,
        "device_bytes": values.device_memory * GIB,
        "disk_bytes": values.disk and values.disk * GIB,
    }
    log = plain_console(stderr=True)
    with tempfile.TemporaryDirectory(dir=values.scratch or None) as directory:
        rows = rehearse(
            config, counts, scales, values.processes, limits, log, pathlib.Path(directory)
        )  # fmt: skip
    if out is not None:
        write_json(out, {"config": values["config"].config_filename, "scales": scales,
                         "counts": dataclasses.asdict(counts), "rows": rows})  # fmt: skip
    show_usage(scales, rows, console)
    end_by_misfits(usage_misfits(rows), console)


def define_flags() -> None:
    define_config()
    flags.DEFINE_list("scale", ["0.008", "0.012", "0.02"], "Shares of the full counts, rising.")
    flags.DEFINE_integer("processes", 4, "Processes on this machine, a host's each.", lower_bound=1)
    define_counts()
    flags.DEFINE_float("device_memory", 15.75, "GiB of a device, for one buffer of it; v5e's.")
    flags.DEFINE_string("scratch", None, "Where the runs are made; the system's, if not given.")
    flags.DEFINE_string("out", None, "Where to write what was found, as JSON.")


if __name__ == "__main__":
    launch(main, define_flags)
