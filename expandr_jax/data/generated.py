"""Queries that a generator wrote for documents: which are trained on, and why others are not."""

import hashlib
import heapq
import re
from collections.abc import Collection, Iterable, Iterator

from expandr_jax.data.benchmarks import query_key
from expandr_jax.data.duplicates import near_duplicates

EMPTY, REPEATED = "empty", "repeated"
TESTED = "a dev or test query, or nearly"
# What stands before a question in a list of them: "1.", "Q2:", "a)", "-".
_NUMBER = r"(?:\d+[.):]|[a-z]\)|q(?:uestion)?\s*\d*[.):])(?=[\s*])"
_MARKER = re.compile(rf"[\s*]*{_NUMBER}\s*|[-*\u2022#>\s]+", re.IGNORECASE)


def drawn_documents(ids: Iterable[str], count: int, seed: int) -> list[str]:
    """So many ids at most, drawn by hashes of the seed and each id alone; in rising order."""

    def draw(document: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}/{document}".encode()).digest(), document

    return sorted(heapq.nsmallest(count, ids, key=draw))


def first_query(text: str) -> str:
    """The first question of those that a generator has listed; "" where it said nothing."""
    for line in text.splitlines():
        if marker := _MARKER.match(line):
            line = line[marker.end() :]
        line = " ".join(line.split()).strip("\"'`* ")
        if line and not line.endswith(":"):  # "Questions:" begins a list.
            return line
    return ""


def sorted_out(
    texts: Iterable[tuple[str, str]], trained: Iterable[str], tested: Collection[str]
) -> Iterator[tuple[str, str, str]]:
    """Yields (name, query, why it is left out: "" where it is kept) of each generated text.

    Args:
        texts: (name, text) of each; its first question is the query.
        trained: Queries that are trained on already: the same ones are not taken again.
        tested: Dev and test queries. One that is the same, but for case, punctuation and white
            space, is left out, and one that is nearly the same, as `near_duplicates` has it.
    """
    held_out = sorted({query_key(query) for query in tested})
    seen, same = {query_key(query) for query in trained}, set(held_out)
    named = [(name, first_query(text)) for name, text in texts]
    nearly = near_duplicates((query for _, query in named), held_out)
    for (name, query), near in zip(named, nearly, strict=True):
        key, why = query_key(query), ""
        if not key:
            why = EMPTY
        elif near or key in same:
            why = TESTED
        elif key in seen:
            why = REPEATED
        seen.add(key)
        yield name, query, why
