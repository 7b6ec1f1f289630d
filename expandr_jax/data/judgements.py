"""Relevance judgements: one line of them, and all of a split."""

import re
from collections.abc import Container, Iterator
from typing import Any, NamedTuple

from expandr_jax.errors import UserError
from expandr_jax.files.records import decode_line, note

Qrels = dict[str, dict[str, int]]
Mistakes = list[UserError] | None

QRELS_HEADER = ("query-id", "corpus-id", "score")


class Judgement(NamedTuple):
    """One line of judgements: where it stands, and what it says."""

    where: str
    query: str
    document: str
    grade: int


def check_id(where: str, key: Any) -> None:
    """Refuses what no run of TREC's can hold, and what differs by a space that nobody sees."""
    if not isinstance(key, str) or key.split() != [key] or "\0" in key:
        raise UserError(f"{where}: id is {key!r}; expected text without white space and NUL")


def columns_of(where: str, line: bytes, separator: str | None) -> list[str]:
    """Query, document and grade of a line; nothing for an empty one."""
    # Not the csv module: ids may hold quotes, which this format does not treat specially.
    columns = decode_line(where, line).rstrip("\r\n").split(separator)
    if columns in ([], [""]):
        return []
    if separator is None:
        if len(columns) != 4:
            raise UserError(f"{where}: {len(columns)} columns; expected query, 0, document, grade")
        del columns[1]
    elif len(columns) != 3 or not all(columns):
        raise UserError(f"{where}: {len(columns)} columns; expected query, document, grade")
    return columns


def judgement_of(where: str, columns: list[Any]) -> Judgement:
    """The judgement of a line; UserError, naming `where`, for one that is none."""
    query, document, grade = columns
    for value in (query, document):
        check_id(where, value)
    # Tables hold whole numbers as 1.0 now and then.
    text = f"{grade:g}" if isinstance(grade, float) else str(grade)
    if not re.fullmatch(r"[+-]?[0-9]{1,4}", text):  # trec_eval's memory grows with the grade.
        raise UserError(f"{where}: grade {grade!r}; expected an integer from -9999 to 9999")
    return Judgement(where, query, document, int(text))


def collect(rows: Iterator[Judgement], queries: Container[str] | None, mistakes: Mistakes) -> Qrels:
    """All judgements, of known queries where these are given; mistakes as `read_beir` has them."""
    qrels: Qrels = {}
    for where, query, document, grade in rows:
        if queries is not None and query not in queries:
            note(UserError(f"{where}: query {query!r} is not among the queries"), mistakes)
        elif qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            other = f"{where}: {query!r} and {document!r} were judged otherwise above"
            note(UserError(other), mistakes)
    return qrels
