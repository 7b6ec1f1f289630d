"""Training queries with positive and negative passages, a JSON object a line.

{"query": "...", "pos": "..." or ["...", ...]} and, where there are any, "neg" (likewise),
"expansion" (likewise; "" is an empty generation), "teacher_scores" (numbers, one a passage: those
of "pos", then those of "neg") and "margin" (a number: the greater, the easier). "positive" and
"negative" are other names of "pos" and "neg".
What other programs' files say of these in further fields ("negative_2", "neg_scores", "prompt") is
refused; ids and whatever else there is are let through.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expandr_jax.errors import UserError
from expandr_jax.files.records import check_field, note, parse_row, read_lines

TRIPLE_SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_CHARACTERS = 1_000_000  # Longest text; a longer one is taken for files run together.
_NAMES = {"pos": ("pos", "positive"), "neg": ("neg", "negative")}
# "hard_negatives", "neg1", "positive_docs" and the like, but no ids; scores, labels and prompts.
_UNREAD = re.compile(
    r"(?!.*ids?$)(\w+_)?(pos|neg)(s|itives?|atives?)?([\W\d_].*)?"
    r"|(\w+_)?(scores?|prompt|instruct|instruction)|labels?|margins?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Triple:
    """A training query.

    Attributes:
        query: its text.
        positives: texts of relevant passages, at least one.
        negatives: texts of passages that are not.
        expansions: texts that a language model wrote for the query; empty ones are left out.
        teacher_scores: of the positives, then of the negatives; or None.
        line: where it stands in its file, from 1; 0: in none.
        margin: how much better its positives are than its negatives; None: as its scores say.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    expansions: tuple[str, ...] = ()
    teacher_scores: tuple[float, ...] | None = None
    line: int = field(default=0, compare=False)
    margin: float | None = None

    @property
    def passages(self) -> tuple[str, ...]:
        """The texts of its positives, then of its negatives."""
        return (*self.positives, *self.negatives)

    @property
    def ease(self) -> float | None:
        """How easy it is: its margin, or its least positive score less its greatest negative one.

        None where it has neither.
        """
        if self.margin is not None or self.teacher_scores is None or not self.negatives:
            return self.margin
        count = len(self.positives)
        return min(self.teacher_scores[:count]) - max(self.teacher_scores[count:])


class MadeTriples(Sequence[Triple]):
    """Triples of queries that are known, each of which a function makes when it is asked for.

    Attributes:
        queries: Text of each one's query.
    """

    def __init__(self, queries: Sequence[str], make: Callable[[int], Triple]):
        self.queries, self._make = queries, make

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, at: Any) -> Any:
        numbers = range(len(self))[at]
        return [*map(self._make, numbers)] if isinstance(numbers, range) else self._make(numbers)


def queries_of(triples: Sequence[Triple]) -> Sequence[str]:
    """Texts of the triples' queries; triples that are made when asked for are not made for it."""
    if isinstance(triples, MadeTriples):
        return triples.queries
    return [triple.query for triple in triples]


def read_triples(path: str | os.PathLike, on_bad: str = "error") -> tuple[list[Triple], list[str]]:
    """Reads a file of triples, gzip-compressed if its name ends in ".gz"; blank lines are skipped.

    Args:
        path: the file.
        on_bad: "error" stops at the first bad line; "skip" leaves such lines out.

    Returns:
        The triples in the order of the file, and the mistake in each line left out.

    Raises:
        UserError: the file cannot be read or has no triple, or, under "error", a line is not
            UTF-8, not a JSON object, or lacks a field or has it empty or with another type; it
            names file and line.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad is {on_bad!r}; expected 'error' or 'skip'")
    mistakes: list[UserError] | None = [] if on_bad == "skip" else None
    triples, skipped = list(stream_triples(path, mistakes)), list(map(str, mistakes or ()))
    if not triples:
        why = f"; the first line skipped: {skipped[0]}" if skipped else ""
        raise UserError(f'{path}: no triples; expected {{"query", "pos", "neg"}} on each line{why}')
    return triples, skipped


def stream_triples(
    path: str | os.PathLike, mistakes: list[UserError] | None = None
) -> Iterator[Triple]:
    """Yields the triples of a file one by one; raises as `read_triples`, but where there are none.

    With `mistakes`, what is wrong with a line is added there, and the line left out.
    """
    for number, line in read_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            triple = _triple(where, parse_row(where, line), number)
        except UserError as error:
            note(error, mistakes)
        else:
            yield triple


def find_sources(path: str | os.PathLike) -> dict[str, Path]:
    """Source -> file, sorted by name.

    Raises:
        UserError: There is no .jsonl or .jsonl.gz file.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    found: dict[str, Path] = {}
    for file in files:
        suffix = next((s for s in TRIPLE_SUFFIXES if file.name.endswith(s)), None)
        if suffix and file.is_file() and not file.name.startswith("."):
            source = file.name.removesuffix(suffix)
            if source in found:
                raise UserError(f"{file}: stands beside {found[source].name}; remove one of them")
            found[source] = file
    if not found:
        raise UserError(f"{path}: no .jsonl file; expected triples of query, positive and negative")
    return found


def _triple(where: str, row: dict[str, Any], line: int) -> Triple:
    known = {"teacher_scores", "margin", *_NAMES["pos"], *_NAMES["neg"]}
    given = [name for name in row if name not in known and row[name] not in (None, "", [])]
    if unread := next(filter(_UNREAD.fullmatch, given), None):
        raise UserError(
            f'{where}: field "{unread}" would not be read; all positives belong into "pos", '
            'negatives into "neg", scores into "teacher_scores", a prompt before the query; else '
            "remove it"
        )
    check_field(where, row, "query", str)
    triple = Triple(
        *_texts(where, "query", row["query"]),
        _texts(where, *_field(where, row, "pos")),
        _texts(where, *_field(where, row, "neg")),
        _texts(where, "expansion", row.get("expansion", []), may_be_empty=True),
        _scores(where, row.get("teacher_scores")),
        line,
        _margin(where, row.get("margin")),
    )
    count = len(triple.positives) + len(triple.negatives)
    if not triple.positives:
        raise UserError(f'{where}: no positive; expected "pos", a string or an array of some')
    if triple.teacher_scores is not None and len(triple.teacher_scores) != count:
        raise UserError(
            f"{where}: {len(triple.teacher_scores)} teacher_scores for {count} passages; expected "
            "one for each of pos, then of neg"
        )
    return triple


def _field(where: str, row: dict[str, Any], name: str) -> tuple[str, Any]:
    """The name that a field has in this row, and its value; an absent one is an empty array."""
    present = [key for key in _NAMES[name] if key in row]
    if len(present) > 1:
        raise UserError(f'{where}: both "{present[0]}" and "{present[1]}"; expected one of them')
    return (present[0], row[present[0]]) if present else (name, [])


def _texts(where: str, name: str, value: Any, may_be_empty: bool = False) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f'{where}: field "{name}" is neither a string nor an array of strings')
    for text in texts:
        if not text.strip() and not may_be_empty:
            raise UserError(f'{where}: field "{name}" has an empty text; give it one or remove it')
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f'{where}: field "{name}" has a text of {len(text):,} characters; expected at most '
                f"{MAX_CHARACTERS:,}"
            )
    # Equal texts, as the negatives of several queries often are, share their memory.
    return tuple(sys.intern(text) for text in texts if text.strip())


def _margin(where: str, value: Any) -> float | None:
    if value is not None and not _is_score(value):
        raise UserError(f'{where}: field "margin" is no finite number')
    return None if value is None else float(value)


def _scores(where: str, value: Any) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(map(_is_score, value)):
        raise UserError(f'{where}: field "teacher_scores" is no array of finite numbers')
    return tuple(map(float, value))


def _is_score(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30
