"""Says whether a run fits a machine, and how long it takes at least, without the machine.

    python -m train.plan --config=configs/llama3_8b_anchordr.py --topology=v5e:4x4 --out=plan.json

Compiles every program of the run for the topology, a TPU slice (v5e, v5p, v6e; by libtpu, here),
or devices of this machine ("cpu:8", "gpu:4", "tpu"). No weights are read and nothing is fetched.
With --search it proposes mesh, micro-batch and recomputation for each phase; with --repeats it also
runs what fits, on devices of this machine, and says how near to the bound that is. Exit status 1
where something does not fit, 2 for a mistake in what was asked.

A second table has what each stage takes of the hosts: memory, disk, files, network, seconds.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
from absl import flags
from rich.console import Console

from expandr_jax.config import Config, read_config
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.planning.compiled import Needs, compile_program, roofline
from expandr_jax.planning.hosts import host_rows, most_disk, show_hosts
from expandr_jax.planning.planned import PAPER, Planned, of_retriever_alone
from expandr_jax.planning.programs import planned_programs, step_b_shapes
from expandr_jax.planning.proposals import config_flags, phases_of, propose
from expandr_jax.planning.timing import time_program
from expandr_jax.planning.topology import TOPOLOGIES, Topology, find_topology
from expandr_jax.report.tables import Bold, render, wide_console
from expandr_jax.runtime.chips import GIB
from expandr_jax.runtime.progress import Reporter, plain_console
from expandr_jax.sharding import batch_divisor, bytes_on_device
from train.counts import counts_of_tests, define_counts, told_counts
from train.launch import define_config, end_by_misfits, launch, output_file


def plan(
    config: Mapping[str, Any] | Config,
    topology: Topology,
    console: Console,
    only: Sequence[str] = (),
    repeats: int = 0,
) -> dict[str, Any]:
    """Compiles the programs of a run.

    Args:
        config: The whole config.
        topology: What to compile for.
        console: Where progress is shown.
        only: Names of programs; (): all of them.
        repeats: Times that each program is run, with made-up numbers; 0: none is.

    Returns:
        {"topology", "rows", ...}, as --out has it.

    Raises:
        UserError: No shape of a model is found, a mesh does not fit, no program is named so, or
            what is to be run is not here.
    """
    if repeats and not topology.is_here:
        raise UserError(
            f"--repeats={repeats}: {topology.name} is compiled for, not here; to run the programs, "
            "give --topology=cpu, gpu or tpu"
        )
    config = read_config(config)
    programs = planned_programs(config, topology)
    unknown = [name for name in only if name not in programs]
    if unknown:
        raise UserError(f"--only={unknown[0]}: expected some of {', '.join(programs)}")
    programs = {name: make for name, make in programs.items() if not only or name in only}
    names = f"compiling for {topology.name}: {', '.join(programs)}"
    console.print(names, soft_wrap=True)
    with (
        Reporter(console).progress("programs compiled", len(programs)) as advance,
        contextlib.ExitStack() as stack,
    ):
        pool = ThreadPoolExecutor(max(1, os.cpu_count() or 1))
        stack.callback(pool.shutdown, cancel_futures=True)  # After a SIGTERM nothing more begins.

        def compiled(
            name: str, planned: Planned, lowered: Any, seconds: float
        ) -> tuple[Planned, Needs, Any]:
            needs = compile_program(lowered, topology.chip, planned.resident)
            row = _row(name, planned, needs, topology, seconds + needs.seconds)
            return planned, needs if repeats else dataclasses.replace(needs, compiled=None), row

        waiting = {}
        for name, make in programs.items():
            start = time.monotonic()
            planned = make()
            lowered = planned.program.lower(*planned.arguments)  # In this thread: it is Python.
            waiting[name] = pool.submit(compiled, name, planned, lowered, time.monotonic() - start)
        for future in as_completed(waiting.values()):
            future.result()  # What cannot be compiled is known at once.
            advance(1)
        made = {name: done.result() for name, done in waiting.items()}
        del waiting, lowered, future  # They hold the programs, too.
        rows = {name: row for name, (_, _, row) in made.items()}
    while repeats and made:
        name = next(iter(made))
        planned, needs, row = made.pop(name)  # A program that was run takes no memory longer.
        console.print(f"running {name}")
        row |= _measured(planned, needs, topology, row, repeats)
        del planned, needs
    return {
        "topology": topology.name,
        "chip": dataclasses.asdict(topology.chip),
        "rows": list(rows.values()),
        # They are of all programs that the paper's run has.
        "paper_chip_hours": None
        if only or of_retriever_alone(config)
        else paper_chip_hours(rows, len(topology.devices), config),
    }


def _row(
    name: str, planned: Planned, needs: Needs, topology: Topology, seconds: float
) -> dict[str, Any]:
    seconds_at_best, bound = roofline(
        topology.chip, planned.devices, planned.run_flops, planned.moved, needs.collectives
    )
    batch = 1 if planned.mesh is None else batch_divisor(planned.mesh)
    sizes = ("argument", "temporary", "resident", "total", "capacity")
    return {
        "program": name,
        "mesh": None if planned.mesh is None else dict(planned.mesh.shape),
        "shares": planned.shares,
        "rows": planned.rows,
        "rows_per_device": planned.rows / batch,
        "bytes_parameters": bytes_on_device(planned.parameters),
        **{f"bytes_{size}": getattr(needs, size) for size in sizes},
        "fits": needs.fits,
        "model_flops": planned.model_flops,
        "collectives": None
        if needs.collectives is None
        else {kind: dataclasses.asdict(found) for kind, found in needs.collectives.items()},
        "compile_seconds": round(seconds, 2),
        "roofline_seconds": seconds_at_best,
        "bound": bound,
        "change": planned.change,
    }


def _measured(
    planned: Planned, needs: Needs, topology: Topology, row: Mapping[str, Any], repeats: int
) -> dict[str, float | None]:
    """What running a row's program a few times gave; nulls where it cannot run."""
    seconds = time_program(planned, needs.compiled, repeats) if needs.fits else None
    if seconds is None:
        return dict.fromkeys(("seconds", "model_flops_utilisation", "share_of_bound"))
    at_peak = planned.model_flops / planned.devices / topology.chip.flops
    return {
        "seconds": seconds,
        "model_flops_utilisation": at_peak / seconds,
        "share_of_bound": row["roofline_seconds"] / seconds,
    }


def paper_chip_hours(
    rows: Mapping[str, Mapping[str, Any]], devices: int, config: Config
) -> dict[str, float]:
    """Chip-hours of the paper's run at the rooflines, which no real run reaches.

    `rows` are those of `plan` by program, `devices` is the number of chips. The generator learns as
    the config has it.
    """

    def calls(program: str, texts: int) -> int:
        return math.ceil(texts / (rows[program]["rows"] * rows[program]["shares"]))

    examples = calls("contrastive step", PAPER["examples"])
    counted = [
        ("candidates", "prefill", calls("prefill", PAPER["queries"])),
        *step_b_shapes(config).paper_calls(calls, config),
        ("contrastive", "contrastive step", PAPER["contrastive_epochs"] * examples),
    ]
    hours = {part: 0.0 for part, _, _ in counted}
    for part, program, count in counted:
        hours[part] += rows[program]["roofline_seconds"] * count * devices / 3600
    return {**hours, "all": sum(hours.values())}


def show_plan(result: Mapping[str, Any], console: Console) -> None:
    """Prints a plan as a table, and what does not fit."""
    ran = "seconds" in result["rows"][0]
    header = [
        "program", "mesh", "rows a device", "parameters", "arguments", "temporary", "held beside",
        "total", "fits", "model TFLOP", "collectives: times, GiB", "compile s", "at least", "bound",
        *(("took", "of bound", "MFU") if ran else ()),
    ]  # fmt: skip
    rows = [
        [
            row["program"],
            _mesh(row),
            f"{row['rows_per_device']:g}",
            *(f"{row[f'bytes_{part}'] / GIB:.2f}"
              for part in ("parameters", "argument", "temporary", "resident", "total")),
            "yes" if row["fits"] else Bold("NO"),
            f"{row['model_flops'] / 1e12:.3g}",
            _collectives(row["collectives"]),
            f"{row['compile_seconds']:.0f}",
            _duration(row["roofline_seconds"]),
            row["bound"],
            *(_took(row) if ran else ()),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    capacity = result["rows"][0]["bytes_capacity"] / GIB
    title = f"{result['topology']}: GiB a device, of {capacity:.2f}"
    console.print(render(title, header, rows))
    hours = result["paper_chip_hours"]
    if hours is None:
        return
    parts = ", ".join(f"{name} {value:.3g}" for name, value in hours.items() if name != "all")
    console.print(
        f"The paper's run takes at least {hours['all']:.3g} chip-hours ({parts}): that is with "
        "every program at its roofline."
    )


def _collectives(found: Mapping[str, Mapping[str, int]] | None) -> str:
    if found is None:
        return "unknown"
    kinds = (f"{kind} {c['count']}, {c['bytes'] / GIB:.3g}" for kind, c in found.items())
    return "\n".join(kinds) or "none"


def _mesh(row: Mapping[str, Any]) -> str:
    if row["mesh"] is None:
        return "1 device"
    sizes = " x ".join(str(size) for size in row["mesh"].values())
    return sizes if row["shares"] == 1 else f"{sizes}, on each of {row['shares']} hosts"


def _took(row: Mapping[str, Any]) -> tuple[str, str, str]:
    if row["seconds"] is None:
        return "-", "-", "-"
    shares = row["share_of_bound"], row["model_flops_utilisation"]
    return (_duration(row["seconds"]), *(f"{share:.1%}" for share in shares))


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def show_proposals(
    proposals: Sequence[Mapping[str, Any]], phases: Sequence[str], console: Console
) -> None:
    """Prints what `propose` found for the phases, as a table and as flags."""
    rows = [
        [
            row["phase"],
            config_flags(row["settings"]),
            f"{row['bytes_total'] / GIB:.2f}",
            _duration(row["roofline_seconds"]),
        ]
        for row in proposals
    ]
    title = "Settings by estimate, compiled until one fits"
    console.print(render(title, ("phase", "settings", "total GiB", "at least"), rows))
    for phase in phases:
        if phase not in {row["phase"] for row in proposals}:
            console.print(f"{phase}: nothing that was tried fits")


def plan_misfits(result: Mapping[str, Any], disk: float | None = None) -> list[str]:
    """What does not fit, and what to change, a line for each program and stage of the hosts.

    `disk` is what a host has of it, in bytes; None: any.
    """
    hosts = result.get("hosts", ())
    lines = [
        *(
            f"{row['program']}: needs {row['bytes_total'] / GIB:.2f} GiB a device of "
            f"{row['bytes_capacity'] / GIB:.2f}; try {row['change']}"
            for row in result["rows"]
            if not row["fits"]
        ),
        *(
            f"{row['stage']}: a process needs {row['bytes_memory'] / GIB:.2f} GiB of its host's "
            f"{row['bytes_capacity'] / GIB:.4g}; try hosts with more memory, or less data"
            for row in hosts
            if not row["fits"]
        ),
    ]
    if disk is not None and hosts and (most := most_disk(hosts)) > disk:
        lines.append(
            f"disk: a run needs {most / GIB:.4g} GiB at one time, of {disk / GIB:.4g}; try less "
            "data, fewer of data.tests, or retriever.vectors=int8"
        )
    return lines


def lost(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What fits by the compiler's word and yet ran out of memory, a line for each program."""
    return [
        f"{row['program']}: ran out of memory when it was run"
        for row in rows
        if row["fits"] and row.get("seconds", 0.0) is None
    ]


def main(_: Any) -> None:
    console, values = wide_console(), flags.FLAGS
    config = read_config(values.config)
    if not values.topology.startswith(("gpu", "tpu")):
        # Slices are compiled for, not used: jax must not look for TPUs.
        jax.config.update("jax_platforms", "cpu")
    topology = find_topology(values.topology)
    out, counts = output_file(values.out), told_counts(config)
    tests = counts_of_tests(config.data.tests, values.test_documents, counts)
    log = plain_console(stderr=True)
    result = plan(config, topology, log, values.only, values.repeats)
    proposals = propose(config, topology, log) if values.search else []
    if not values.only:
        memory = values.host_memory * GIB
        hosts = host_rows(config, counts, topology, memory, tests)
        result["hosts"] = [{**dataclasses.asdict(row), "fits": row.fits} for row in hosts]
    if out is not None:
        write_json(out, {**result, "proposals": proposals})
    show_plan(result, console)
    if not values.only:
        show_hosts(result["hosts"], console)
    if values.search:
        show_proposals(proposals, phases_of(config, topology), console)
    for line in lost(result["rows"]):
        console.print(line, soft_wrap=True)
    end_by_misfits(plan_misfits(result, values.disk and values.disk * GIB), console)


def define_flags() -> None:
    define_config()
    flags.DEFINE_string("topology", "v5e:4x4", f"What to compile for: {TOPOLOGIES}.")
    flags.DEFINE_list("only", [], "Programs to compile, by their names in the table; all if empty.")
    define_counts()
    flags.DEFINE_list(
        "test_documents",
        [],
        "Documents of each of data.tests, or one number for all; if not given: the run's own.",
    )
    flags.DEFINE_bool("search", False, "Propose meshes, micro-batch and recomputation, too.")
    flags.DEFINE_integer(
        "repeats", 0, "Times to run each program on the devices here; 0: compile only.",
        lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_string("out", None, "Where to write the plan, as JSON.")


if __name__ == "__main__":
    launch(main, define_flags)
