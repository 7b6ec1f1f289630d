"""Query expansion by strategy: what the generator is asked, and what becomes of its texts.

A strategy is two small functions of a query and its texts: `sparse` makes BM25's query, `dense` the
texts whose vectors are averaged. An empty generation is left out; without any, the query is alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

from expandr_jax.errors import UserError
from expandr_jax.expansion import prompts
from expandr_jax.ranking import fusion
from expandr_jax.vectors.encoder import Kind

FEEDBACK = 10  # Documents that BM25 finds for a prompt that shows some.
LEAST_CHARACTERS = 40  # Of each document in a message that would be too long with more.
SEPARATOR = "[SEP]"  # Replaced by the retriever's own.


@dataclasses.dataclass(frozen=True)
class Ask:
    """One thing that the generator is asked.

    Attributes:
        name: Of its own; sets its draws apart from others'.
        prompt: A name in expandr_jax/expansion/prompts.py.
    """

    name: str
    prompt: str

    @property
    def needs_passages(self) -> bool:
        """Whether it shows documents that were found for the query."""
        return "passages" in prompts.strategy(self.prompt).fields

    def message(
        self,
        query: str,
        passages: Sequence[str],
        *,
        most_characters: int,
        fits: Callable[[str], bool],
    ) -> str:
        """What the generator is told.

        Args:
            query: The query.
            passages: Documents to show, if it shows any.
            most_characters: Of each document.
            fits: Whether a message is short enough; documents are cut until it is, because a
                prompt that is too long loses its beginning.
        """
        while True:
            shown = [" ".join(passage.split())[:most_characters] for passage in passages] or ["-"]
            text = prompts.render(self.prompt, query, passages=shown)
            if most_characters <= LEAST_CHARACTERS or fits(text):
                return text
            most_characters = max(LEAST_CHARACTERS, most_characters * 3 // 4)


def document_message(
    name: str, document: str, *, most_characters: int, fits: Callable[[str], bool]
) -> str:
    """What the generator is told to expand a document.

    Args:
        name: A key of `prompts.DOCUMENT_STRATEGIES`.
        document: Its text.
        most_characters: Of it.
        fits: Whether a message is short enough; the document is cut until it is.
    """
    while True:
        text = prompts.render_document(name, " ".join(document.split())[:most_characters])
        if most_characters <= LEAST_CHARACTERS or fits(text):
            return text
        most_characters = max(LEAST_CHARACTERS, most_characters * 3 // 4)


@dataclasses.dataclass(frozen=True)
class DenseQuery:
    """What a query's vector is made of: w E(query) + (1 - w) mean of E(texts).

    Attributes:
        texts: Encoded each on its own.
        query_weight: w.
    """

    texts: list[str]
    query_weight: float


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to expand a query.

    Attributes:
        requests: What is asked, `samples` times each.
        samples: As the method's authors have it.
        sparse: (query, texts) to BM25's query.
        dense: (query, texts, the weight that is asked for) to what is encoded.
        kind: How `dense`'s texts are encoded: "query" where the query stands in them.
    """

    requests: tuple[Ask, ...]
    samples: int
    sparse: Callable[[str, Sequence[str]], str]
    dense: Callable[[str, Sequence[str], float], DenseQuery]
    kind: Kind = "document"


def repeated(times: int) -> Callable[[str, Sequence[str]], str]:
    """The query so many times, then the texts."""
    return lambda query, texts: " ".join([query] * (times if texts else 1) + list(texts))


def balanced(query: str, texts: Sequence[str]) -> str:
    """The query once for every six times that it fits into the texts, then the texts (MuGI)."""
    return repeated(max(1, len(" ".join(texts)) // (6 * len(query))))(query, texts)


def alternated(query: str, texts: Sequence[str]) -> str:
    """The query before each text (LameR)."""
    return " ".join(part for text in texts for part in (query, text)) or query


def lower_cased(query: str, texts: Sequence[str]) -> str:
    """The query once for each passage and its extract, then all of them, lower-cased (CSQE)."""
    return repeated(max(1, len(texts) // 2))(query, texts).lower()


def weighted(query: str, texts: Sequence[str], query_weight: float) -> DenseQuery:
    """The texts, and the query with the weight that is asked for."""
    return DenseQuery(list(texts), query_weight)


def one_of_them(query: str, texts: Sequence[str], query_weight: float) -> DenseQuery:
    """The mean of the query and the texts, all alike."""
    return DenseQuery(list(texts), 1 / (1 + len(texts)))


def joined(separator: str) -> Callable[[str, Sequence[str], float], DenseQuery]:
    """The query and each text read as one."""
    return lambda query, texts, query_weight: DenseQuery(
        [f"{query}{separator}{text}" for text in texts], 0.0
    )


def _asked(name: str, samples: int, *rest, **options) -> Strategy:
    return Strategy((Ask(name, name),), samples, *rest, **options)


STRATEGIES = {
    "q2d": _asked("q2d", 1, repeated(5), weighted),
    "pydoc": _asked("pydoc", 1, repeated(5), weighted),
    **{
        name: _asked(name, 8, repeated(5), one_of_them)
        for name in prompts.STRATEGIES
        if name == "hyde" or name.startswith("hyde-")
    },
    "query2doc": _asked("query2doc", 1, repeated(5), joined(f" {SEPARATOR} "), kind="query"),
    "q2e": _asked("q2e", 1, repeated(1), joined(" "), kind="query"),
    "q2c": _asked("q2c", 1, repeated(5), joined(" "), kind="query"),
    "mugi": _asked("mugi", 5, balanced, joined(" "), kind="query"),
    "lamer": _asked("lamer", 5, alternated, one_of_them),
    "csqe": Strategy((Ask("q2d", "q2d"), Ask("csqe", "csqe")), 5, lower_cased, one_of_them),
}
PUBLISHED = ("q2d", "hyde", "query2doc", "q2e", "q2c", "mugi", "lamer", "csqe")
FEEDBACKS = {  # (query vectors, vectors of the documents found first) to query vectors
    "prf-average": fusion.average_feedback,
    "prf-rocchio": lambda query, found: fusion.rocchio(query, found, alpha=0.9, beta=0.1),
}
FEEDBACK_DEPTH = 3  # Documents that vector feedback takes to be relevant.
RANK_FUSIONS = {"rrf": fusion.reciprocal_rank_fusion, "exp4fuse": fusion.exp4fuse}
SCORE_FUSIONS = {  # Equal weights.
    "interpolation": lambda runs: fusion.interpolate(runs, [1 / len(runs)] * len(runs))
}

ALL = "all"  # Stands for these. Expanded documents, a text for each, have to be asked for.
TABLE = (
    "bm25", *(f"bm25+{name}" for name in PUBLISHED),
    "dense", *(f"dense+{name}" for name in (*PUBLISHED, *FEEDBACKS)),
    "rrf:bm25:dense", "interpolation:bm25:dense", "rrf:bm25:dense+q2d",
    "exp4fuse:bm25:bm25+q2d", "exp4fuse:dense:dense+q2d",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class System:
    """One row of the results.

    Attributes:
        name: As the user wrote it.
        base: "bm25", "dense" or, of a fusion, its name.
        method: A key of `STRATEGIES` or `FEEDBACKS`, or None.
        parts: Of a fusion, the systems that it fuses.
        documents: How the corpus is expanded, a key of `prompts.DOCUMENT_STRATEGIES`, or None.
    """

    name: str
    base: str
    method: str | None = None
    parts: tuple["System", ...] = ()
    documents: str | None = None

    @property
    def plain(self) -> "System":
        """The same search for the queries as they are."""
        return System(self.name.partition("+")[0], self.base, documents=self.documents)

    @property
    def strategy(self) -> Strategy | None:
        """How it expands queries, if it does."""
        return STRATEGIES.get(self.method) if self.method else None

    def with_parts(self) -> tuple["System", ...]:
        """Itself and, of a fusion, what it fuses."""
        return (*self.parts, self)


def parse_system(name: str) -> System:
    """Reads "bm25", "dense", "BASE+STRATEGY", "dense+prf-average" or "rrf:SYSTEM:SYSTEM".

    "BASE@STRATEGY" searches a corpus whose documents are expanded, as in "dense@d2q+q2d".

    Raises:
        UserError: There is no such system.
    """
    base, *parts = name.split(":")
    if base in RANK_FUSIONS or base in SCORE_FUSIONS:
        if len(set(parts)) < 2:
            raise UserError(f"system {name!r}: expected two systems to fuse, {base}:bm25:dense")
        return System(name, base, parts=tuple(map(parse_system, parts)))
    where, plus, method = name.partition("+")
    base, at, documents = where.partition("@")
    methods = {"bm25": STRATEGIES, "dense": {**STRATEGIES, **FEEDBACKS}}.get(base)
    if methods is None:
        known = ", ".join(("bm25", "dense", *RANK_FUSIONS, *SCORE_FUSIONS))
        raise UserError(f"system {name!r} is unknown; a system begins with one of {known}")
    if plus and method not in methods:
        raise UserError(f"system {name!r}: expected {base}+ one of {', '.join(methods)}")
    if at and documents not in prompts.DOCUMENT_STRATEGIES:
        known = ", ".join(prompts.DOCUMENT_STRATEGIES)
        raise UserError(f"system {name!r}: expected {base}@ one of {known}")
    return System(name, base, method or None, documents=documents or None)


def parse_systems(names: Sequence[str]) -> list[System]:
    """Reads names of systems, `ALL` among them, each system once.

    Raises:
        UserError: There is no such system, or there are none.
    """
    each = [name for given in names for name in (TABLE if given == ALL else (given,))]
    if not each:
        raise UserError("no systems; expected bm25, dense and so on, or all")
    return [parse_system(name) for name in dict.fromkeys(each)]
