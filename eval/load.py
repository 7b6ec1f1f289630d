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
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
from absl import flags
from rich.console import Console

from eval.benchmarks.http_load import Load, bodies, for_requests, for_seconds, run_load
from eval.finished import FILES_READ, Finished, open_finished
from expandr_jax.data.beir import read_beir, read_qrels
from expandr_jax.errors import UserError
from expandr_jax.files.records import write_json
from expandr_jax.report.tables import render
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from expandr_jax.serving import TOKEN_VARIABLE
from train.launch import define_workdir, launch, output_file

PEER_PACKAGES = ("faiss", "sentence_transformers")
VARIANTS = [(threads, batched) for batched in (0, 1) for threads in (1, 2)]
SAID = {"plain": "are searched", "expanded": "are expanded", "all": "are compiled"}
K = 10
MOST_CLIENTS = 1024
WARM = 2.0  # Seconds that nobody counts.
DOCUMENTS_A_WRITE = 100  # Documents of a write.
UNCACHED = 24  # Queries whose passages are timed.
PRINTED = {  # What is printed, and what each has of a row.
    "mode": "mode", "clients": "clients", "p50 ms": "p50_ms", "p99 ms": "p99_ms",
    "a second": "queries_per_second", "errors": "errors", "peer p50": "peer_p50_ms",
    "peer a second": "peer_queries_per_second",
}  # fmt: skip


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
            further, plain = {}, bodies(queries, k=K)
            if flags.FLAGS.soak:
                further["soak"] = _growth(port, process, plain, flags.FLAGS.soak)
            if flags.FLAGS.writes:
                further["writes"] = _writes(port, plain, flags.FLAGS.writes)
    rows = [_row(mode, count, load) for mode, of in found.items() for count, load in of.items()]
    peers = _peers(run, queries, clients, seconds, console) if flags.FLAGS.peer else {}
    for count, (p50, rate, name) in peers.items():
        for row in rows:
            if row["clients"] == count and row["mode"] == "plain":
                row |= {"peer_p50_ms": p50, "peer_queries_per_second": rate, "peer_name": name}
    sampled = _sampled(run, some, console)
    rows.append({"mode": "expanded, written", "clients": 1, **written, "sampler_p50_ms": sampled})
    machine = {"platform": platform.platform(), "cores": psutil.cpu_count()}
    return {"machine": machine, "start": start, "rows": rows, **further}


def _queries(run: Finished) -> list[str]:
    texts = read_beir(run.workdir / "data").queries
    return [texts[name] for name in read_qrels(run.workdir / "qrels.trec")]


@contextlib.contextmanager
def _server(run: Finished, state: str) -> Iterator[tuple[int, psutil.Process, dict[str, float]]]:
    """A server: its port, its process, and seconds from the start until each mode answered."""
    begun, start = time.perf_counter(), {}
    arguments = [f"--workdir={run.workdir}", f"--state={state}", "--port=0"]
    open_to_all = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.serve", *arguments], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env=open_to_all,
    )  # fmt: skip
    try:
        for mode, words in SAID.items():
            last = ""
            for line in process.stdout:
                if words in line:
                    break
                last = line
            else:
                raise UserError(f"eval.serve did not begin: {last.strip()}")
            start[mode] = round(time.perf_counter() - begun, 2)
        yield int(re.search(r":(\d+): ", line)[1]), psutil.Process(process.pid), start
    finally:
        process.terminate()
        process.wait()


def _loads(
    port: int, contents: list[bytes], clients: Sequence[int], seconds: float
) -> dict[int, Load]:
    found = {}
    for count in clients:
        run_load(port, "/search", contents, count, for_seconds(WARM))
        found[count] = run_load(port, "/search", contents, count, for_seconds(seconds))
    return found


def _expanded(port: int, queries: Sequence[str]) -> dict[str, float]:
    """What passages take that are written for the first time, one query after the other."""
    took, inside = [], []
    for query in queries:
        start = time.perf_counter()
        body = {"query": query, "k": K, "mode": "expanded", "timeout_ms": 60_000}
        inside.append(1000 * _ask(port, "POST", "/search", body)["seconds"]["expand"])
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
    run_load(port, "/search", contents, 16, for_seconds(WARM))
    before = process.memory_info().rss
    load = run_load(port, "/search", contents, 16, for_requests(most))
    grown = (process.memory_info().rss - before) / 2**20
    return {"requests": most, "errors": load.errors, "memory_growth_mib": round(grown, 1)}


def _writes(port: int, contents: list[bytes], most: int) -> dict:
    """What searches see while documents are added, and half of them removed again."""
    writing, loads = True, []

    def search() -> None:
        loads.append(run_load(port, "/search", contents, 4, lambda: writing))

    searching = threading.Thread(target=search)
    searching.start()
    start = time.perf_counter()
    try:
        for first in range(0, most, DOCUMENTS_A_WRITE):
            names = range(first, min(first + DOCUMENTS_A_WRITE, most))
            new = [{"id": f"load-{i}", "text": f"Document {i} of a load."} for i in names]
            _ask(port, "POST", "/documents", {"documents": new})
        added = time.perf_counter()
        for number in range(0, most, 2):
            _ask(port, "DELETE", f"/documents/load-{number}")
    finally:
        writing = False
        searching.join()
    end = time.perf_counter()
    (load,) = loads
    return {
        "added": most, "added_a_second": round(most / (added - start), 1),
        "removed": len(range(0, most, 2)),
        "removed_a_second": round(len(range(0, most, 2)) / (end - added), 1),
        "searches": len(load.milliseconds), "failed_searches": load.errors,
        "search_p50_ms": load.percentile(50), "search_p99_ms": load.percentile(99),
    }  # fmt: skip


def _ask(port: int, method: str, path: str, body: Any = None) -> Any:
    """One answer."""
    content = None if body is None else json.dumps(body).encode()
    url, kind = f"http://127.0.0.1:{port}{path}", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, content, kind, method=method)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


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


def counts(clients: Sequence[str]) -> list[int]:
    """The numbers that --clients has; UserError for what is none."""
    if not clients or not all(c.isdecimal() and 1 <= int(c[:9]) <= MOST_CLIENTS for c in clients):
        raise UserError(
            f"--clients={','.join(clients)}: expected numbers from 1 to {MOST_CLIENTS}, as 1,16,64"
        )
    return list(map(int, clients))


def main(_: Sequence[str]) -> None:
    values = flags.FLAGS
    clients = counts(values.clients)
    out, console = output_file(values.out), plain_console()
    run = open_finished(local_copy(values.workdir, *FILES_READ))
    results = measure(run, clients, values.seconds, console)
    rows = [[_shown(row.get(name)) for name in PRINTED.values()] for row in results["rows"]]
    console.print(render("Load", [*PRINTED], rows))
    for name in ("start", "soak", "writes"):
        if name in results:
            console.print(f"{name}: {results[name]}", markup=False)
    if out:
        write_json(out, results)


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_list("clients", ["1", "16", "64"], "Connections at once, one after the other.")
    flags.DEFINE_float("seconds", 30.0, "For each number of clients.", lower_bound=0.1)
    flags.DEFINE_integer("soak", 0, "Requests after which the memory is compared; 0: none.", 0)
    flags.DEFINE_integer("writes", 0, "Documents added, and half removed, under load; 0: none.", 0)
    flags.DEFINE_boolean("peer", True, "Measure the peer, too.")
    flags.DEFINE_integer("slots", 8, "Those of the sampler beside expanded search.", 1)
    flags.DEFINE_string("out", None, "A file for the results, as JSON.")


if __name__ == "__main__":
    launch(main, define_flags)
