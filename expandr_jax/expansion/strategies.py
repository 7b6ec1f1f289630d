"""Query expansion by strategy: what the generator is asked, and what becomes of its texts.

A strategy is two small functions of a query and its texts: `sparse` makes BM25's query, `dense` the
texts whose vectors are averaged. An empty generation is left out; without any, the query is alone.
"""

import dataclasses
from collections.abc import Callable, Sequence

from expandr_jax.expansion import prompts
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
