"""A finished run as a tool of agents: `python -m eval.mcp --workdir=RUN`, over stdin and stdout.

Speaks the Model Context Protocol. It searches the run's documents; with --write it has the state of
a service, so that it finds documents that were added, and adds and removes some.
"""

import asyncio
import contextlib
import pathlib
import threading
from collections.abc import Sequence
from typing import Annotated, Any

from absl import flags
from pydantic import Field

from eval.finished import FILES_READ, Finished, check_installed, open_finished
from eval.serve import cached_programs, state_of
from expandr_jax.errors import UserError
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from expandr_jax.serving import bodies
from expandr_jax.serving.cache import Cache
from expandr_jax.serving.documents import LiveDocuments, View
from expandr_jax.serving.expansions import ServedExpansions
from expandr_jax.serving.pair import Asked, Pair
from expandr_jax.serving.state import take
from train.launch import define_workdir, launch

MOST_TOLD = 50
INSTRUCTIONS = "Searches a collection of documents by meaning. Ask as one would ask a person."
Count = Annotated[int, Field(ge=1, le=MOST_TOLD, description="Documents that are returned.")]
Expand = Annotated[
    bool, Field(description="Write a passage that might answer the query, and search by it, too.")
]


class FoundDocuments(bodies.BaseModel):
    """What was found; the expansion is what a model wrote, and no fact."""

    expansion: list[str]
    results: list[bodies.Result]


class Tools:
    """What an agent may do; everything is loaded when it is first asked for.

    Args:
        run: The run.
        state: The state of a service, which was taken; None: the run alone is searched.
    """

    def __init__(self, run: Finished, state: pathlib.Path | None):
        self._run, self._state = run, state
        self._lock = threading.Lock()
        self._pair: Pair | None = None
        self._expansions: ServedExpansions | None = None
        self._documents: LiveDocuments | None = None

    async def search(
        self, query: bodies.Query, k: Count = 5, expand: Expand = True
    ) -> FoundDocuments:
        """Finds the documents that answer a query best."""
        return await asyncio.to_thread(self._search, query, k, expand)

    async def add_document(self, id: bodies.Id, text: str) -> str:
        """Adds a document, or replaces the one of the same id."""
        if len(text) > bodies.MOST_TEXT:
            raise ValueError(f"expected a text of at most {bodies.MOST_TEXT} characters")
        replaced = await asyncio.to_thread(self._write, lambda own: own.put([(id, text)]))
        return "replaced" if replaced else "added"

    async def remove_document(self, id: bodies.Id) -> str:
        """Removes a document."""
        removed = await asyncio.to_thread(self._write, lambda own: own.remove([id]))
        return "removed" if removed else "there was none of this id"

    def close(self) -> None:
        """Leaves the documents as they are on disk."""
        if self._documents is not None:
            self._documents.close()

    def _search(self, query: str, k: int, expand: bool) -> FoundDocuments:
        with self._lock:
            pair = self._loaded()
            expansion = self._expanded(pair, query) if expand else None
            (answer,) = pair.search([Asked(query, k, expansion)])
        results = [bodies.Result(id=h.id, score=h.score, text=h.text) for h in answer.hits]
        return FoundDocuments(expansion=list(expansion.texts) if expansion else [], results=results)

    def _write(self, write: Any) -> int:
        with self._lock:
            self._loaded()
            return write(self._documents)

    def _loaded(self) -> Pair:
        if self._pair is None:
            documents = View.of(self._run.base(self._run.documents()))
            if self._state is not None:
                documents = self._documents = self._run.live_documents(self._state)
            self._pair = self._run.pair(documents)
        return self._pair

    def _expanded(self, pair: Pair, query: str) -> Any:
        if self._expansions is None:
            cache, quiet = None, plain_console(quiet=True)
            if self._state is not None:
                cache = Cache(self._state / "expansions.sqlite")
            self._expansions = self._run.expansions(pair, quiet, 1, 0.0, cache)
        return self._expansions.find(query) or self._expansions.make([query])[0]


def make_server(tools: Tools, write: bool) -> Any:
    """The server, with the tools that it may have."""
    from mcp.server import MCPServer

    server = MCPServer("expandr-jax", instructions=INSTRUCTIONS, log_level="ERROR")
    server.tool()(tools.search)
    if write:
        server.tool()(tools.add_document)
        server.tool()(tools.remove_document)
    return server


def main(_: Sequence[str]) -> None:
    check_installed("mcp", "mcp")
    values = flags.FLAGS
    if values.state and not values.write:
        raise UserError("--state goes with --write")
    state = state_of(values.workdir, values.state) if values.write else None
    run = open_finished(local_copy(values.workdir, *FILES_READ))
    with contextlib.ExitStack() as stack:
        if state is not None:
            stack.enter_context(take(state))
            cached_programs(state)
        tools = Tools(run, state)
        stack.callback(tools.close)
        make_server(tools, values.write).run()


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_boolean("write", False, "Let agents add and remove documents, too.")
    flags.DEFINE_string("state", None, "Where those are kept; default: serve/ in the workdir.")


if __name__ == "__main__":
    launch(main, define_flags)
