"""The page of a service: a question, what was written for it, and both rankings side by side."""

import dataclasses
import importlib.resources
import re
from collections.abc import Collection, Mapping, Sequence

from expandr_jax.report.page import clip, template
from expandr_jax.serving import bodies
from expandr_jax.serving.documents import Hit
from expandr_jax.serving.service import Answer, Refused, Service

SHOWN_DOCUMENTS = 10  # Documents of a ranking.
PASSAGE_SECONDS = 30.0  # How long a page waits for a passage.
_CHARACTERS = 320  # A document's beginning.
_LEAST = 3  # Letters of a word that is marked.
_WORDS = re.compile(r"\w+")
_COMMON = frozenset(  # Marked, they would hide the others.
    """and are but can does for from has have how into its not that the their them then they this
    was what when where which who why will with you your""".split()  # noqa: SIM905
)
ASSETS = {"page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
        "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Pieces = list[tuple[str, str]]  # Parts of a text, and how each is marked: "", "asked", "written".


@dataclasses.dataclass(frozen=True)
class RankingRow:
    """A document in a ranking."""

    id: str
    score: str
    pieces: Pieces
    moved: str = ""
    trend: str = ""


@dataclasses.dataclass(frozen=True)
class RankingColumn:
    """A ranking."""

    title: str
    rows: list[RankingRow]


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the page shows of an answer; `without` says why there is no expansion."""

    expansions: list[Pieces]
    without: str
    times: str
    columns: list[RankingColumn]


def file_text(name: str) -> str:
    """A file of the page, one of `ASSETS`."""
    return (importlib.resources.files("expandr_jax.serving") / "templates" / name).read_text(
        "utf-8"
    )


async def page(service: Service, query: str, examples: Sequence[str]) -> tuple[int, str]:
    """Status and text of the page for a query; "": of the page where one is asked for."""
    status, found, problem = 200, None, ""
    query = query.strip()
    if len(query) > bodies.MOST_QUERY:
        status, problem = 422, f"The question is longer than {bodies.MOST_QUERY} characters."
    elif query:
        try:
            found = await _found(service, query)
        except Refused as error:
            status, problem = error.status, f"{str(error).capitalize()}."
    content = {
        "query": query[: bodies.MOST_QUERY], "found": found, "problem": problem,
        "examples": examples, "most_query": bodies.MOST_QUERY, "most_id": bodies.MOST_ID,
        "most_text": bodies.MOST_TEXT,
    }  # fmt: skip
    return status, template("expandr_jax.serving", "search.html").render(content)


def moves(before: Sequence[Hit], after: Sequence[Hit]) -> list[tuple[str, str]]:
    """How far each document of a ranking has moved since an earlier one, in words, and whither."""
    ranks = {hit.id: rank for rank, hit in enumerate(before)}
    said = []
    for rank, hit in enumerate(after):
        gained = ranks.get(hit.id, len(before) + rank) - rank
        if hit.id not in ranks:
            said.append(("new", "new"))
        elif gained:
            said.append(
                (f"{'▲' if gained > 0 else '▼'} {abs(gained)}", "up" if gained > 0 else "down")
            )
        else:
            said.append(("=", "same"))
    return said


def marked(text: str, asked: Collection[str], written: Collection[str]) -> Pieces:
    """A text in pieces, of which words of the query and of its expansion are marked."""
    pieces, end = [], 0
    for word in _WORDS.finditer(text):
        folded = word[0].casefold()
        kind = "asked" if folded in asked else "written" if folded in written else ""
        if kind:
            pieces += [(text[end : word.start()], ""), (word[0], kind)]
            end = word.end()
    return [piece for piece in [*pieces, (text[end:], "")] if piece[0]]


async def _found(service: Service, query: str) -> Shown:
    plain = await service.search(query, SHOWN_DOCUMENTS, "plain", PASSAGE_SECONDS)
    answer, without = plain, "This service does not expand queries."
    if service.expands:
        answer = await service.search(query, SHOWN_DOCUMENTS, "expanded", PASSAGE_SECONDS)
        without = "The passage was not there in time; ask again."
    texts = answer.expansion.texts if answer.expansion else ()
    asked = _words([query])
    written = _words(texts) - asked
    columns = [_column("Query alone", plain.hits, asked, ())]
    if answer.expansion:
        columns.append(
            _column(
                "Query and expansion", answer.hits, asked, written, moves(plain.hits, answer.hits)
            )
        )
    return Shown(
        [marked(text or "(nothing)", asked, ()) for text in texts], without, _times(answer), columns
    )


def _column(
    title: str,
    hits: Sequence[Hit],
    asked: Collection[str],
    written: Collection[str],
    moved: Sequence[tuple[str, str]] = (),
) -> RankingColumn:
    rows = []
    for place, hit in enumerate(hits):
        text = clip(" ".join(hit.text.split()), _CHARACTERS)
        said, trend = moved[place] if moved else ("", "")
        rows.append(
            RankingRow(hit.id, f"{hit.score:.3f}", marked(text, asked, written), said, trend)
        )
    return RankingColumn(title, rows)


def _words(texts: Sequence[str]) -> set[str]:
    found = {word.casefold() for text in texts for word in _WORDS.findall(text)}
    return {word for word in found if len(word) >= _LEAST and word not in _COMMON}


def _times(answer: Answer) -> str:
    seconds: Mapping[str, float] = answer.seconds
    steps = [f"{step} {1000 * value:.1f} ms" for step, value in seconds.items()]
    kept = " The passage was there already." if answer.expansion and answer.expansion.cached else ""
    return f"{', '.join(steps)}.{kept}"
