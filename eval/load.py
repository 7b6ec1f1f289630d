"""Measures the service of a finished run: `python -m eval.load --workdir=RUN --out=FILE`.

Starts `eval.serve` with a state of its own, asks it the run's test queries from --clients
connections at once for --seconds each, and then its peer, FastAPI with sentence-transformers and
FAISS: with one request a call and with batches as ours, on 1 and 2 threads, of which the best
counts. All of them share the machine's cores with the client. FILE is as that of eval.speed.
"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
from absl import flags
from rich.console import Console

from eval.benchmarks.http_load import Load, bodies, run_load
from eval.finished import READ, Finished, open_finished
from expandr_jax.data.beir import read_beir, read_qrels
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.report.tables import render
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from train.launch import define_workdir, launch, output_file

PEER_PACKAGES = ("faiss", "sentence_transformers")
VARIANTS = [(threads, batched) for batched in (0, 1) for threads in (1, 2)]
K = 10
WARM = 2.0  # Seconds that nobody counts.
UNCACHED = 24  # Queries whose passages are timed.
COLUMNS = (
    "mode", "clients", "p50_ms", "p99_ms", "queries_per_second", "errors", "peer_p50_ms",
    "peer_queries_per_second",
)  # fmt: skip


def measure(run: Finished, clients: Sequence[int], seconds: float, console: Console) -> dict:
    """Returns what --out holds: {"machine", "start", "rows"}, and further rows by their names."""
    queries = _queries(run)
    with tempfile.TemporaryDirectory() as state:
        with _server(run, state):  # Its programs are compiled, and kept.
            pass
        with _server(run, state) as (port, process, start):
            console.print(f"ready: {start}", markup=False)
            found = {}
            for mode in ("plain", "distilled"):
                if mode == "distilled" and not run.distilled_path.exists():
                    continue
                found[mode] = _loads(port, bodies(queries, k=K, mode=mode), clients, seconds)
            some = queries[:UNCACHED]
            written = _expanded(port, some)
            kept = bodies(some, k=K, mode="expanded")
            found["expanded, kept"] = _loads(port, kept, clients, seconds)
            growth = _growth(port, process, bodies(queries, k=K), flags.FLAGS.soak)
    rows = [_row(mode, count, load) for mode, of in found.items() for count, load in of.items()]
    for count, (p50, rate, name) in _peers(run, queries, clients, seconds, console).items():
        for row in rows:
            if row["clients"] == count and row["mode"] == "plain":
                row |= {"peer_p50_ms": p50, "peer_queries_per_second": rate, "peer_name": name}
    sampled = _sampled(run, some, console)
    rows.append({"mode": "expanded, written", "clients": 1, **written, "sampler_p50_ms": sampled})
    machine = {"platform": platform.platform(), "cores": psutil.cpu_count()}
    return {"machine": machine, "start": start, "rows": rows, **growth}


def _queries(run: Finished) -> list[str]:
    texts = read_beir(run.workdir / "data").queries
    return [texts[name] for name in read_qrels(run.workdir / "qrels.trec")]


@contextlib.contextmanager
def _server(run: Finished, state: str) -> Iterator[tuple[int, psutil.Process, dict[str, float]]]:
    """A server: its port, its process, and seconds from the start until each mode answered."""
    begun, start = time.perf_counter(), {}
    arguments = [f"--workdir={run.workdir}", f"--state={state}", "--port=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.serve", *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        for mode, words in (("plain", "are searched"), ("expanded", "are expanded")):
            line = process.stdout.readline()
            if words not in line:
                raise UserError(f"eval.serve: did not begin: {line.strip()}")
            start[mode] = round(time.perf_counter() - begun, 2)
        time.sleep(WARM)  # Programs for writes are being compiled.
        yield int(re.search(r":(\d+): ", line)[1]), psutil.Process(process.pid), start
    finally:
        process.terminate()
        process.wait()


def _loads(
    port: int, contents: list[bytes], clients: Sequence[int], seconds: float
) -> dict[int, Load]:
    found = {}
    for count in clients:
        run_load(port, "/search", contents, count, WARM)
        found[count] = run_load(port, "/search", contents, count, seconds)
    return found


def _expanded(port: int, queries: Sequence[str]) -> dict[str, float]:
    """What passages take that are written for the first time, one query after the other."""
    took, inside = [], []
    for body in bodies(queries, k=K, mode="expanded", timeout_ms=60_000):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/search", body, {"Content-Type": "application/json"}
        )
        start = time.perf_counter()
        with urllib.request.urlopen(request) as answer:
            inside.append(1000 * json.load(answer)["seconds"]["expand"])
        took.append(1000 * (time.perf_counter() - start))
    return {"p50_ms": statistics.median(took), "expand_p50_ms": statistics.median(inside)}


def _sampled(run: Finished, queries: Sequence[str], console: Console) -> float:
    """What the sampler alone takes for the same passages."""
    made = run.expansions(run.pair(None), console, flags.FLAGS.slots, 0.0)
    made.compile()
    took = []
    for query in queries:
        start = time.perf_counter()
        made.written([query])
        took.append(1000 * (time.perf_counter() - start))
    return statistics.median(took)


def _growth(port: int, process: psutil.Process, contents: list[bytes], most: int) -> dict:
    """How much the server's memory grows by many requests."""
    if not most:
        return {}
    run_load(port, "/search", contents, 16, WARM)
    before = process.memory_info().rss
    load = run_load(port, "/search", contents, 16, 0, most)
    grown = (process.memory_info().rss - before) / 2**20
    return {"soak": {"requests": most, "errors": load.errors, "memory_growth_mib": grown}}


def _peers(
    run: Finished, queries: list[str], clients: Sequence[int], seconds: float, console: Console
) -> dict[int, tuple[float, float, str]]:
    """Clients -> the least median, the highest rate of all variants, and the latter's name."""
    missing = [name for name in PEER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        console.print(f"no peer: not installed: {', '.join(missing)}")
        return {}
    found: dict[int, list[tuple[float, float, str]]] = {}
    for threads, batched in VARIANTS:
        name = f"{threads} threads, {'batched' if batched else 'one a call'}"
        process = subprocess.Popen(
            [sys.executable, "-m", "eval.benchmarks.serving_peer", str(run.workdir),
             str(threads), str(batched)],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            port = int(process.stdout.readline())
            for count, load in _loads(port, bodies(queries, k=K), clients, seconds).items():
                console.print(f"peer, {name}, {count} clients: {load.rate:.0f} queries/s")
                found.setdefault(count, []).append((load.percentile(50), load.rate, name))
        finally:
            process.terminate()
            process.wait()
    return {
        count: (min(p50 for p50, _, _ in of), *max(of, key=lambda one: one[1])[1:])
        for count, of in found.items()
    }


def _row(mode: str, clients: int, load: Load) -> dict[str, Any]:
    return {
        "mode": mode, "clients": clients, "p50_ms": load.percentile(50),
        "p99_ms": load.percentile(99), "queries_per_second": load.rate, "errors": load.errors,
        "peer_p50_ms": None, "peer_queries_per_second": None,
    }  # fmt: skip


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def main(_: Sequence[str]) -> None:
    values = flags.FLAGS
    out, console = output_file(values.out), plain_console()
    run = open_finished(local_copy(values.workdir, *READ))
    results = measure(run, list(map(int, values.clients)), values.seconds, console)
    rows = [[_shown(row.get(name)) for name in COLUMNS] for row in results["rows"]]
    console.print(render("Load", COLUMNS, rows))
    for name in ("start", "soak"):
        if name in results:
            console.print(f"{name}: {results[name]}", markup=False)
    if out:
        write_json(out, results)


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_list("clients", ["1", "16", "64"], "Connections at once, one after the other.")
    flags.DEFINE_float("seconds", 30.0, "For each number of clients.", lower_bound=0.1)
    flags.DEFINE_integer("soak", 0, "Requests after which the memory is compared; 0: none.")
    flags.DEFINE_integer("slots", 8, "Of the sampler that expanded search is compared with.")
    flags.DEFINE_string("out", None, "A file for the results, as JSON.")


if __name__ == "__main__":
    launch(main, define_flags)
