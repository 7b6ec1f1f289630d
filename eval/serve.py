"""Serves a finished run over HTTP: `python -m eval.serve --workdir=RUN --port=8000`.

Searches with the trained pair, keeps its documents up to date and expansions at hand. What it
writes lies in --state; the run is only read. docs/serve.md has all of it.
"""

import os

# Before numpy is imported: a product is a tenth of a millisecond for one thread, while two would
# wait for each other whenever a model has one of the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import logging
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags
from rich.console import Console

from eval.finished import FILES_READ, Finished, check_installed, open_finished
from expandr_jax.errors import UserError
from expandr_jax.report.expansion_cards import shown_queries
from expandr_jax.runtime.bucket import is_bucket
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from expandr_jax.serving import TOKEN_VARIABLE
from expandr_jax.serving.cache import Cache
from expandr_jax.serving.queries import LONG_TOKENS
from expandr_jax.serving.state import take
from train.launch import EXIT_TERMINATED, define_workdir, launch

SWITCH = 0.0005  # Seconds after which a thread lets another one go on that has an answer to send.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(run: Finished, state: pathlib.Path, console: Console) -> None:
    """Serves until it is stopped.

    Raises:
        UserError: The address is taken or wants a token, or the run or the state cannot be used.
    """
    from expandr_jax.serving.app import make_app
    from expandr_jax.serving.prometheus import ServiceMetrics
    from expandr_jax.serving.service import Limits, Service

    sys.setswitchinterval(SWITCH)
    values = flags.FLAGS
    access = access_of(values.host, values.names)
    listening = listen(values.host, values.port)
    with take(state):
        cached_programs(state)
        limits = Limits(values.waiting_searches, values.waiting_expansions)
        service = Service(ServiceMetrics(), limits, values.expand)
        server = _server(make_app(service, access, shown_queries(run.workdir)))
        failed: list[Exception] = []
        host = f"[{values.host}]" if ":" in values.host else values.host
        address = f"http://{host}:{listening.getsockname()[1]}"

        def load() -> None:
            try:
                for said in begin(service, run, state, console):
                    console.print(f"{address}: {said}", soft_wrap=True)
            except Exception as error:
                failed.append(error)
                server.should_exit = True

        thread = threading.Thread(target=load, name="load", daemon=True)
        thread.start()
        try:
            server.run([listening])
        finally:
            service.close()
            if thread.is_alive() and not failed:
                # A program that is being compiled would abort the process. Nothing is lost.
                console.print("stopped while it was loading")
                os._exit(EXIT_TERMINATED)
        if failed:
            raise failed[0]


def begin(service: Any, run: Finished, state: pathlib.Path, console: Console) -> Iterator[str]:
    """Loads the models one after the other; yields a line for people when one of them answers."""
    values, start = flags.FLAGS, time.perf_counter()
    gate = run.gate if values.expand else None
    documents = run.live_documents(state, values.merge_from, gate)
    pair = run.pair(documents, gate)
    pair.compile(LONG_TOKENS)
    service.begin(pair, documents)
    yield f"{len(documents)} documents are searched ({time.perf_counter() - start:.1f} s)"
    pair.compile()
    if values.expand:
        cache = None
        if values.cache == "on":
            size, seconds = values.cache_mb << 20, values.cache_days * 86400.0
            cache = Cache(state / "expansions.sqlite", size, seconds)
        made = run.expansions(pair, console, values.slots, values.temperature, cache)
        made.compile(1)
        pair.compile_expanded(made.texts)
        service.begin_expanding(made)
        yield f"queries are expanded ({time.perf_counter() - start:.1f} s)"
        if gate:
            gate.count_words(documents)
        made.compile()
    run.compile_documents()  # Last: writes may wait for it, searches not.
    yield f"all programs are compiled ({time.perf_counter() - start:.1f} s)"


def cached_programs(state: pathlib.Path) -> None:
    """Keeps compiled programs, unless the environment says where."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(state / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def access_of(host: str, names: Sequence[str]) -> Any:
    """Who may ask; UserError where nobody said whom else to keep out."""
    from expandr_jax.serving.guard import Access

    token = os.environ.get(TOKEN_VARIABLE, "").strip()  # A file ends in a newline, too.
    if host in LOOPBACK:
        return Access((*Access().hosts, *map(str.lower, names)), token)
    if not token:
        raise UserError(
            f"--host={host}: everybody who reaches it could read and write; set {TOKEN_VARIABLE} "
            "to a secret that requests must have"
        )
    if not names:
        raise UserError(f"--host={host}: add --names=NAME, the names that it is called by")
    return Access(tuple(map(str.lower, names)), token)


def listen(host: str, port: int) -> socket.socket:
    """Takes an address; UserError if another has it."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: {error.strerror or error}; choose another"
        ) from None


def _server(app: Callable):
    import uvicorn

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app, access_log=False, log_config=None, server_header=False, timeout_keep_alive=30,
        timeout_graceful_shutdown=10,
    )  # fmt: skip
    return uvicorn.Server(config)


def main(_: Sequence[str]) -> None:
    check_installed("serve", "fastapi", "prometheus_client", "uvicorn")
    values = flags.FLAGS
    state = state_of(values.workdir, values.state)
    serve(open_finished(local_copy(values.workdir, *FILES_READ)), state, plain_console())


def state_of(workdir: str, state: str | None) -> pathlib.Path:
    """The directory of a service's state; UserError unless it is one of this machine."""
    if is_bucket(state or workdir):
        raise UserError(f"{state or workdir}: add --state=DIR, a directory of this machine")
    path = pathlib.Path(state or pathlib.Path(workdir, "serve")).absolute()
    if path.resolve() == pathlib.Path(workdir).resolve():
        raise UserError(f"--state={state}: is the run, which is only read; expected another place")
    return path


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_string(
        "host", "127.0.0.1", f"Where it listens; beyond it {TOKEN_VARIABLE} is wanted."
    )
    flags.DEFINE_integer("port", 8000, "0: any that is free.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_list("names", [], "Further names that it is called by, as in Host headers.")
    flags.DEFINE_string("state", None, "What it writes; default: serve/ in the workdir.")
    flags.DEFINE_boolean("expand", True, "Load the generator, too.")
    flags.DEFINE_float("temperature", 0.0, "The passages'; 0: the likeliest.", lower_bound=0.0)
    flags.DEFINE_integer("slots", 8, "Passages that are written at once.", lower_bound=1)
    flags.DEFINE_enum("cache", "on", ["on", "off"], "Keep expansions, with their queries.")
    flags.DEFINE_integer(
        "cache_mb", 256, "Most that they take.", lower_bound=1, upper_bound=1 << 20
    )
    flags.DEFINE_float(
        "cache_days", 90.0, "Older ones are forgotten.", lower_bound=0.01, upper_bound=36_500.0
    )
    flags.DEFINE_integer("merge_from", 4096, "Writes that start a merge.", lower_bound=1)
    flags.DEFINE_integer("waiting_searches", 256, "More get 429.", lower_bound=1)
    flags.DEFINE_integer("waiting_expansions", 64, "More get 429.", lower_bound=1)


if __name__ == "__main__":
    launch(main, define_flags)
