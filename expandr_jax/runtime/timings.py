"""timings.json of a run: seconds and peak memory of its phases, and seconds of its searches."""

import contextlib
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import psutil

from expandr_jax.files.records import write_json


def add_phase(path: pathlib.Path, name: str, seconds: float, peak: int) -> None:
    """Adds the seconds of a phase to those that it has, and keeps its highest peak, in bytes."""
    timings = _read(path)
    phases = {row["phase"]: row for row in timings["phases"]}
    row = phases.setdefault(name, {"phase": name, "seconds": 0.0, "peak_memory_bytes": 0})
    row["seconds"] = round(row["seconds"] + seconds, 3)
    row["peak_memory_bytes"] = max(row["peak_memory_bytes"], peak)
    # A run may go on elsewhere than where config.json was written.
    row |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    rows = list(phases.values())
    total = {
        "total_seconds": round(sum(row["seconds"] for row in rows), 3),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in rows),
    }
    write_json(path, timings | {"phases": rows, **total})


def add_search(path: pathlib.Path, system: str, queries: int, seconds: float) -> None:
    """Records the seconds of a system's search, and replaces those recorded before."""
    timings = _read(path)
    found = {row["system"]: row for row in timings.get("searches", [])}
    found[system] = {"system": system, "queries": queries, "seconds": seconds}
    write_json(path, timings | {"searches": [*found.values()]})


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The timings so far; none where the file is absent or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        timings = json.loads(path.read_bytes().decode())
        phases = {
            row["phase"]: {**row, "seconds": float(row["seconds"]),
                           "peak_memory_bytes": int(row["peak_memory_bytes"])}
            for row in timings["phases"]
        }  # fmt: skip
        searches = {row["system"]: row for row in timings.get("searches", [])}
        kept = {"searches": [*searches.values()]} if searches else {}
        return {**timings, "phases": [*phases.values()], **kept}
    return {"phases": []}


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Samples this process's resident memory while a phase runs; yields what gives the peak."""
    peak, process, stop = 0, psutil.Process(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, process.memory_info().rss)
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak
    finally:
        stop.set()
        thread.join()
