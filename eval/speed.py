"""Measures this project's speed beside other libraries': `python -m eval.speed --out=FILE`.

    python -m eval.speed --only=sampling,dpo --out=speed.json

Each side runs in a process of its own, in float32 and on two threads, from the same inputs. Their
results are compared first; then they take turns, --repeats times, and medians are compared. A ratio
above 1 means that this project is quicker. The machine's peaks of matrix products and of reading
memory are measured too: "share" is what part of the former a side reaches, and "floor" the rate at
which the row's operations and bytes would pass at both peaks.

    python -m eval.speed --only=encode --against=../before --out=speed.json

has this project's own side in another checkout, such as the commit before a change, in the place of
the other library.
"""

import importlib.metadata
import pathlib
import platform
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
from absl import flags
from rich.console import Console
from rich.table import Table

from eval.benchmarks import NAMES, THREADS, Comparison, Different
from eval.benchmarks.process import MACHINE, PREPARE, TUNE, SideProcess, benchmark, outputs_path
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.report.tables import render
from expandr_jax.runtime.progress import plain_console
from train.launch import launch

AGAINST = "against"  # Where the other checkout's sides read and write.


def measure(
    names: Sequence[str], repeats: int, console: Console, against: pathlib.Path | None = None
) -> dict[str, Any]:
    """Runs benchmarks.

    Args:
        names: Some of `eval.benchmarks.NAMES`, or full names of such modules.
        repeats: Times that each side does the work.
        console: Where progress is shown.
        against: Another checkout of this project, in the place of each row's peer.

    Returns:
        What `--out` holds: {"machine", "rows"}. A row whose sides failed, or differ in their
        results, has "failed" and no numbers.

    Raises:
        UserError: A benchmark cannot be prepared.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        console.print("measuring the machine")
        machine = _description() | _only_answer(SideProcess(directory, MACHINE, MACHINE))
        rows = []
        if against is not None:  # What it reads may be written in another way.
            (directory / AGAINST).mkdir()
        for name in names:
            console.print(f"{name}: preparing")
            if against is not None:
                _only_answer(SideProcess(directory / AGAINST, name, PREPARE, tree=against))
            costs = _only_answer(SideProcess(directory, name, PREPARE))["costs"]
            for number, comparison in enumerate(benchmark(name).ROWS):
                try:
                    row = measure_row(
                        directory, name, number, comparison, repeats, console, against
                    )
                except UserError as error:  # The other rows took long to measure, and are kept.
                    console.print(f"{error}", markup=False)
                    rows.append(_empty_row(comparison) | {"failed": str(error)})
                    continue
                rows.append(row | _limits(row, costs[number], machine))
    return {"machine": machine, "rows": rows}


def measure_row(
    directory: pathlib.Path,
    name: str,
    number: int,
    comparison: Comparison,
    repeats: int,
    console: Console,
    against: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Measures one row; its peer is null, with the reason, where it is not installed."""
    row = _empty_row(comparison)
    packages = comparison.packages if against is None else ()
    missing = [package for package in packages if _version(package) is None]
    # Each side's directory, what it is asked for, and whose code it runs.
    places = {"ours": (directory, "ours", None), "peer": (directory, "peer", None)}
    if against is not None:
        places["peer"] = (directory / AGAINST, "ours", against)
        row["peer_name"] = str(against)
    elif missing:
        del places["peer"]
    elif packages:
        row["peer_name"] += f" {_version(packages[0])}"
    if against is None and not missing and comparison.tune:
        console.print(f"{comparison.name}: the peer's best setting is searched")
        _only_answer(SideProcess(directory, name, TUNE, number))
    sides, measured = {}, {}
    try:
        for side, (place, what, tree) in places.items():
            console.print(f"{comparison.name}: {side} loads, compiles and warms up")
            sides[side] = SideProcess(place, name, what, number, tree)
            row[f"setting_{side}"] = sides[side].answer()["setting"]
            setting = row[f"setting_{side}"] and f" ({row[f'setting_{side}']})"
            console.print(f"{comparison.name}: {side} is ready{setting}")
            measured[side] = []
        if not missing:
            row["checked"] = _checked(
                [outputs_path(place, name, what, number) for place, what, _ in places.values()],
                comparison,
                row["peer_name"],
            )
            console.print(f"{comparison.name}: {row['checked']}")
        for repeat in range(repeats):
            for side in list(sides)[:: -1 if repeat % 2 else 1]:  # A B, B A: what drifts is shared.
                process = sides[side]
                measured[side].append(process.measure())
                rate = f"{measured[side][-1]['rate']:.4g} {comparison.unit}"
                console.print(f"{comparison.name}: {repeat + 1}/{repeats}, {side}: {rate}")
    finally:
        for process in sides.values():
            process.close()
    for side in ("ours", "peer"):
        each = measured.get(side)
        row[side] = each and statistics.median(m["rate"] for m in each)
        row[f"peak_memory_{side}"] = each and max(m["peak_memory"] for m in each)
        row[f"each_{side}"] = each and [m["rate"] for m in each]
    row["ratio"] = row["ours"] / row["peer"] if row["peer"] else None
    if missing:
        row["reason"] = f"not installed: {', '.join(missing)}"
    return row


def _empty_row(comparison: Comparison) -> dict[str, Any]:
    measured = ("ours", "peer", "ratio", "peak_memory_ours", "peak_memory_peer")
    names = {"name": comparison.name, "unit": comparison.unit, "peer_name": comparison.peer_name}
    return names | dict.fromkeys(measured)


def _checked(paths: Sequence[pathlib.Path], comparison: Comparison, peer_name: str) -> str:
    outputs = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            outputs.append(dict(file))
    try:
        return comparison.check(*outputs)
    except Different as difference:
        raise UserError(
            f"{comparison.name}: not measured, {peer_name} came to something else: {difference}"
        ) from None


def _limits(
    row: dict[str, Any], cost: dict[str, float | None], machine: dict[str, Any]
) -> dict[str, Any]:
    """Shares of the machine's matrix-product peak, and the rate at the peaks of both kinds."""
    limits = {}
    if cost["flops"]:
        for side in ("ours", "peer"):
            if row[side]:
                limits[f"share_{side}"] = row[side] * cost["flops"] / machine["matmul_flops"]
        seconds = cost["flops"] / machine["matmul_flops"]
        if cost["bytes"]:
            limits["bytes"] = cost["bytes"]
            limits["floor_of_bytes"] = machine["read_bytes"] / cost["bytes"]
            seconds = max(seconds, cost["bytes"] / machine["read_bytes"])
        limits |= {"flops": cost["flops"], "floor": 1 / seconds}
    return limits


def _only_answer(process: SideProcess) -> dict[str, Any]:
    try:
        return process.answer()
    finally:
        process.close()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _description() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "threads": THREADS,
        "memory": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "jax": _version("jax"),
    }


def speed_table(result: dict[str, Any]) -> Table:
    """The rows, for people."""
    machine = result["machine"]
    title = (
        f"{machine['threads']} threads of {machine['cores']} cores; matrix products "
        f"{machine['matmul_flops'] / 1e9:.0f} GFLOP/s, reading "
        f"{machine['read_bytes'] / 1e9:.1f} GB/s"
    )
    rows = []
    for row in result["rows"]:

        def number(name: str, form: str, of: float = 1.0, row: dict[str, Any] = row) -> str:
            return "-" if row.get(name) is None else format(row[name] / of, form)

        reason = row.get("reason") or ("failed" if "failed" in row else "")
        rows.append(
            [
                row["name"],
                row["unit"],
                number("ours", ".4g"),
                number("peer", ".4g"),
                row["peer_name"] + (f" ({reason})" if reason else ""),
                number("ratio", ".2f"),
                number("peak_memory_ours", ".2f", 1e9),
                number("peak_memory_peer", ".2f", 1e9),
                f"{number('share_ours', '.0%')}, {number('floor', '.4g')}",
            ]
        )
    header = ("row", "unit", "ours", "peer", "", "ratio", "GB ours", "GB peer", "share, floor")
    return render(title, header, rows)


def main(_: Sequence[str]) -> None:
    values = flags.FLAGS
    unknown = sorted(set(values.only) - set(NAMES))
    if unknown or not values.only:
        raise UserError(f"--only={','.join(values.only)}: expected some of {', '.join(NAMES)}")
    if not values.out:
        raise UserError("--out is missing: the file to write, e.g. --out=speed.json")
    out = pathlib.Path(values.out)
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out={out}: there is no directory {out.absolute().parent}")
    against = values.against and pathlib.Path(values.against).absolute()
    if against and not (against / "eval" / "benchmarks" / "process.py").is_file():
        raise UserError(f"--against={values.against}: not a checkout of this project")
    console = plain_console(soft_wrap=True)
    result = measure(values.only, values.repeats, console, against)
    write_json(out, result)
    console.print(speed_table(result))
    failed = [row["failed"] for row in result["rows"] if "failed" in row]
    if failed:
        raise UserError(f"{len(failed)} of {len(result['rows'])} rows failed: {failed[0]}")


def define_flags() -> None:
    flags.DEFINE_list("only", list(NAMES), f"Benchmarks to run, of {', '.join(NAMES)}.")
    flags.DEFINE_string("out", None, "The JSON file to write.")
    flags.DEFINE_string("against", None, "Another checkout of this project, to be the peer.")
    flags.DEFINE_integer("repeats", 5, "Times that each side does the work.", lower_bound=1)


if __name__ == "__main__":
    launch(main, define_flags)
