"""Filters queries that a generator wrote for documents, and says why some are left out."""

import dataclasses
import difflib
import functools
import hashlib
import heapq
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from expandr_jax.data.benchmarks import query_key
from expandr_jax.data.duplicates import near_duplicates, words
from expandr_jax.files.records import hash_json

LEAST_WORDS = 3  # "What is expit?"
COPIED_SHARE = 2 / 3  # A line more of whose words stand in the prompt, in order, is a copy of it.
EMPTY, REPEATED = "empty, or code alone", "repeated"
SHORT, HEADING = f"fewer than {LEAST_WORDS} words", "a heading"
COPIED, TESTED = "a copy of the prompt", "a dev or test query, or nearly"
# What stands before a question in a list of them: "1.", "Q2:", "a)", "-".
_NUMBER = r"(?:\d+[.):]|[a-z]\)|q(?:uestion)?\s*\d*[.):])(?=[\s*])"
_MARKER = re.compile(rf"[\s*]*{_NUMBER}\s*|[-*\u2022#>\s]+", re.IGNORECASE)
# A block of code in a named language, whose end may have been cut.
_CODE = re.compile(
    r"^[ \t]*```[ \t]*[\w+#.-]+[ \t]*$.*?(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class JudgedQueries:
    """Queries with what is relevant to each.

    Attributes:
        texts: Query id -> query.
        relevant: Ids of the relevant documents of each, the best first, in the same order.
    """

    texts: Mapping[str, str]
    relevant: Sequence[Sequence[str]]

    @functools.cached_property
    def key(self) -> str:
        """sha256 over all of it."""
        return hash_json([[*self.texts.items()], [[*of] for of in self.relevant]])


def drawn_documents(ids: Iterable[str], count: int, seed: int) -> list[str]:
    """So many ids at most, drawn by hashes of the seed and each id alone; in rising order."""

    def draw(document: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"{seed}/{document}".encode()).digest(), document

    return sorted(heapq.nsmallest(count, ids, key=draw))


def first_query(text: str, asked: str = "") -> tuple[str, str]:
    """The first usable query of those that a generator has listed, and "".

    A query is a line of `LEAST_WORDS` words or more that have letters. A script without spaces has
    a word for every two letters; a label ("Answer:") is no word. It is no heading, that is it does
    not end with a colon, nor, unless it is a question, begin with "#"; and it does not say again
    what the generator was asked. Code is passed over.

    Args:
        text: What the generator wrote.
        asked: The prompt, without its document.

    Returns:
        The query and "". Where there is none, the first line that says anything, and what is wrong
        with it.
    """
    prompt, unusable = words(asked), ("", EMPTY)
    for marked in _CODE.sub("", text).splitlines():
        line = marked
        while marker := _MARKER.match(line):
            line = line[marker.end() :]
        line = " ".join(line.split()).strip("\"'`* ")
        if not words(line):
            continue
        why = _fault(line, marked.lstrip().startswith("#"), prompt)
        if not why:
            return line, ""
        if unusable[1] == EMPTY:
            unusable = line, why
    return unusable


def _fault(line: str, titled: bool, prompt: list[str]) -> str:
    """Why a line is no query; "" where it is one."""
    if line.endswith((":", "\uff1a")) or (titled and not line.endswith(("?", "\uff1f"))):
        return HEADING
    if _word_count(line) < LEAST_WORDS:
        return SHORT
    own = words(line)
    blocks = difflib.SequenceMatcher(None, own, prompt, autojunk=False).get_matching_blocks()
    return COPIED if sum(block.size for block in blocks) > COPIED_SHARE * len(own) else ""


def _word_count(line: str) -> int:
    """Words with letters, as `first_query` counts them."""
    count = 0
    for word in line.split():
        letters = [*filter(str.isalpha, word)]
        if letters and not word.endswith((":", "\uff1a")):
            # "Lo": neither capital nor small, as of Chinese, Japanese, Korean and Thai.
            count += max(1, sum(unicodedata.category(c) == "Lo" for c in letters) // 2)
    return count


def sorted_out(
    texts: Iterable[tuple[str, str]],
    trained: Iterable[str],
    tested: Collection[str],
    asked: str = "",
) -> Iterator[tuple[str, str, str]]:
    """Yields (name, query, why it is left out: "" where it is kept) of each generated text.

    Args:
        texts: (name, text) of each; its `first_query` is the query.
        trained: Queries that are trained on already: the same ones are not taken again.
        tested: Dev and test queries. One that is the same, but for case, punctuation and white
            space, is left out, and one that is nearly the same, as `near_duplicates` has it.
        asked: The prompt, without its document.
    """
    held_out = sorted({query_key(query) for query in tested})
    seen, same = {query_key(query) for query in trained}, set(held_out)
    named = [(name, *first_query(text, asked)) for name, text in texts]
    nearly = near_duplicates((query for _, query, _ in named), held_out)
    for (name, query, fault), near in zip(named, nearly, strict=True):
        key, why = query_key(query), fault
        if not why and (near or key in same):
            why = TESTED
        elif not why and key in seen:
            why = REPEATED
        seen.add(key)
        yield name, query, why


def generated_names(written: Iterable[tuple[str, int]], prompt: str) -> list[str]:
    """Ids of generated queries, by (document, sample); `prompt` is what they were asked by."""
    return [f"{prompt}/{document}/{sample}" for document, sample in written]


def generated_rows(
    written: Mapping[tuple[str, int], str],
    prompt: str,
    trained: Iterable[str],
    tested: Collection[str],
    asked: str = "",
) -> list[dict[str, str]]:
    """A row for each generated text: its id, document and query, and why it is left out or "".

    Args:
        written: (document, sample) -> text.
        prompt: What the texts were asked by, with which their ids begin.
        trained, tested, asked: As of `sorted_out`.
    """
    named = zip(generated_names(written, prompt), written.values(), strict=True)
    return [
        {"query_id": name, "document_id": document, "query": query, "left_out": why}
        for (document, _), (name, query, why) in zip(
            written, sorted_out(named, trained, tested, asked), strict=True
        )
    ]
