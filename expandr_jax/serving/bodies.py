"""The bodies of the HTTP API's requests and answers, as /openapi.json describes them."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

MOST_QUERY = 2000  # Characters.
MOST_TEXT = 100_000  # Characters of a document.
MOST_ID = 256
MOST_DOCUMENTS = 1000  # A request's.
MOST_RESULTS = 1000
MOST_IDS = 1000  # A filter's.
MOST_MS = 120_000
DEFAULT_MS = 10_000


def _without_space(name: str) -> str:
    """An id as collections have it; ValueError if it is none."""
    if not 0 < len(name) <= MOST_ID or name.split() != [name] or "\0" in name:
        raise ValueError(f"expected an id of 1 to {MOST_ID} characters without white space")
    return name


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    return text


Id = Annotated[str, Field(min_length=1, max_length=MOST_ID), AfterValidator(_without_space)]
Query = Annotated[
    str, Field(min_length=1, max_length=MOST_QUERY, pattern=r"\S"), AfterValidator(_not_blank)
]
Timeout = Annotated[int, Field(ge=1, le=MOST_MS, description="Waits so long for a passage.")]
Mode = Literal["plain", "distilled", "expanded", "auto"]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Filter(_Body):
    """A filter of results."""

    ids: Annotated[list[Id], Field(max_length=MOST_IDS)]


class SearchBody(_Body):
    """The body of a search request."""

    query: Query
    k: Annotated[int, Field(ge=1, le=MOST_RESULTS)] = 10
    mode: Mode = "plain"
    timeout_ms: Timeout = DEFAULT_MS
    filter: Filter | None = None


class ExpandBody(_Body):
    """A query to write passages for."""

    query: Query
    timeout_ms: Timeout = DEFAULT_MS


class Document(_Body):
    """A document; what is searched is its title, a space and its text."""

    id: Id
    text: Annotated[str, Field(max_length=MOST_TEXT)]
    title: Annotated[str, Field(max_length=MOST_TEXT)] = ""

    @property
    def whole(self) -> str:
        """Title and text, as the readers of collections put them together."""
        return f"{self.title} {self.text}".strip()


class DocumentsBody(_Body):
    """Documents to add, or that replace those of the same ids."""

    documents: Annotated[list[Document], Field(min_length=1, max_length=MOST_DOCUMENTS)]


class Expanded(BaseModel):
    """What was written for a query."""

    texts: list[str]
    cached: bool


class Result(BaseModel):
    """A document that was found."""

    id: str
    score: float
    text: str


class SearchAnswer(BaseModel):
    """What was found; `mode` is "plain" and `late` true where the passage did not come in time."""

    mode: Mode
    late: bool
    expansion: Expanded | None
    results: list[Result]
    seconds: dict[str, float]


class ExpandAnswer(BaseModel):
    """What was written, or nothing, late."""

    late: bool
    expansion: Expanded | None
    seconds: float


class DocumentsAnswer(BaseModel):
    """How many documents are new, and how many were there before."""

    added: int
    replaced: int


class DocumentAnswer(BaseModel):
    """A document as it is searched."""

    id: str
    text: str


class RemovedAnswer(BaseModel):
    """A document that is gone."""

    removed: bool


class Health(BaseModel):
    """Which modes answer by now."""

    ready: dict[str, bool]
    documents: int


class Problem(BaseModel):
    """Why a request was not answered."""

    reason: str
    message: str


class ErrorAnswer(BaseModel):
    """What is said to a request that was not answered."""

    error: Problem
