"""Asks a finished run: `python -m eval.search --workdir=DIR "how do I pad an array"`.

Shows the passage that the trained generator writes, the documents found without and with it, and
how long each step took. With --interactive it goes on with a question a line.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from absl import flags
from rich.console import Console

from eval.finished import FILES_READ, Finished, open_finished
from expandr_jax.errors import UserError
from expandr_jax.report.tables import Bold, render
from expandr_jax.runtime.mirror import local_copy
from expandr_jax.runtime.progress import plain_console
from expandr_jax.serving.cache import Expansion
from expandr_jax.serving.documents import Hit, View
from expandr_jax.serving.expansions import ServedExpansions
from expandr_jax.serving.pair import Asked, Pair
from train.launch import define_workdir, launch

SNIPPET = 160  # Characters of a document that are shown.


class Times:
    """What each step has taken since the last question was answered."""

    def __init__(self, console: Console):
        self._console, self._seconds = console, {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step, and shows its name meanwhile."""
        start = time.perf_counter()
        with self._console.status(name):
            yield
        self._seconds[name] = time.perf_counter() - start

    def told(self) -> str:
        """All steps in a line."""
        parts = ", ".join(f"{name} {value:.2f} s" for name, value in self._seconds.items())
        self._seconds.clear()
        return parts


def ask(run: Finished, questions: Iterator[str], count: int, console: Console) -> None:
    """Answers questions, by the expansion and the first `count` documents before and after it."""
    times = Times(console)
    with times.step("load index"):
        documents = View.of(run.base(run.documents()))
    with times.step("load models"):
        pair = run.pair(documents)
        expansions = run.expansions(pair, console, slots=1)
    console.print(f"{len(documents)} documents; {times.told()}")
    for question in questions:
        if question.strip():
            answer(pair, expansions, question.strip(), count, console, times)


def answer(
    pair: Pair, expansions: ServedExpansions, query: str, count: int, console: Console, times: Times
) -> None:
    """Answers one question."""
    with times.step("write passages"):
        (expansion,) = expansions.make([query])
    with times.step("search"):
        before, after = pair.search([Asked(query, count), Asked(query, count, expansion)])
    _show_expansion(expansion, console)
    for title, found in (("query alone", before), ("query + expansion", after)):
        console.print(render(title, ("score", "document", "text"), [*map(_row, found.hits)]))
    console.print(times.told())


def _show_expansion(expansion: Expansion, console: Console) -> None:
    for passage in expansion.texts:
        console.print("expansion: ", end="", style="bold")
        console.print(passage or "(empty)")


def _row(hit: Hit) -> list[str]:
    text = " ".join(hit.text.split())
    return [
        f"{hit.score:.3f}",
        Bold(hit.id),
        text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…",
    ]


def _questions(given: Sequence[str], interactive: bool, console: Console) -> Iterator[str]:
    """The question of the command, if there is one, and those that are typed then."""
    if given:
        yield " ".join(given)
    while interactive:
        if sys.stdin.isatty():
            console.print("question: ", end="", style="bold")
        if not (line := sys.stdin.readline()):
            return
        yield line


def main(arguments: Sequence[str]) -> None:
    values = flags.FLAGS
    if len(arguments) < 2 and not values.interactive:
        raise UserError('what to search for is missing: eval.search --workdir=DIR "a question"')
    if arguments[1:] and not " ".join(arguments[1:]).strip():
        raise UserError('the query is empty; give it in quotes: eval.search --workdir=DIR "..."')
    console = plain_console()
    run = open_finished(local_copy(values.workdir, *FILES_READ))
    ask(run, _questions(arguments[1:], values.interactive, console), values.count, console)


def define_flags() -> None:
    define_workdir()
    flags.DEFINE_integer("count", 5, "Documents shown.", lower_bound=1)
    flags.DEFINE_boolean("interactive", False, "Go on with a question a line, until the last.")


if __name__ == "__main__":
    launch(main, define_flags, words=True)
