"""TREC topics: the queries of a track, in any of the layouts they are published in."""

import html
import os
import re
from collections.abc import Iterator
from pathlib import Path

from expandr_jax.errors import UserError
from expandr_jax.files.records import decode_line, read_lines

_START = re.compile(r"<top(?:ic)?\b", re.IGNORECASE)
_TOPIC = re.compile(r"<(top(?:ic)?)\b([^>]*)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_NUMBER = re.compile(r"""\bnumber\s*=\s*["']([^"']*)["']""", re.IGNORECASE)
_PART = re.compile(r"<(\w+)>([^<]*)")  # Older tracks do not close their parts.
_LABEL = re.compile(r"^\s*(?:number|topic|description|narrative)\s*:", re.IGNORECASE)
TOPIC_FIELDS = ("title", "query")  # What a search box would be given, as tracks call it.


def read_topics(path: str | os.PathLike) -> dict[str, str]:
    """Reads topics: `<top>` as in the ad hoc tracks, `<topic number="1">`, or id-tab-query lines.

    Returns:
        Topic id -> its title, or its query where it has none; white space is made single.

    Raises:
        UserError: Naming file and line: not UTF-8, no topic, one that does not end, lacks a
            number or a text, or has an id that stands twice.
    """
    path = Path(path)
    text = "".join(decode_line(f"{path}:{number}", line) for number, line in read_lines(path))
    parse = _tagged(path, text) if _START.search(text) else _lines(path, text)
    topics: dict[str, str] = {}
    for where, key, query in parse:
        if not key or key.split() != [key]:
            raise UserError(f"{where}: topic id {key!r}; expected one without white space")
        if key in topics:
            raise UserError(f"{where}: topic {key!r} stands twice")
        topics[key] = " ".join(query.split())
        if not topics[key]:
            raise UserError(f"{where}: topic {key!r} has no text")
    if not topics:
        raise UserError(f"{path}: no topics; expected <top>, <topic> or lines of id, tab, query")
    return topics


def _tagged(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    end = 0
    while start := _START.search(text, end):
        where = f"{path}:{text.count(chr(10), 0, start.start()) + 1}"
        found = _TOPIC.match(text, start.start())
        if not found or _START.search(found[3]):
            raise UserError(f"{where}: the topic does not end before the next")
        end = found.end()
        parts = {name.lower(): part for name, part in _PART.findall(found[3])}
        number = _NUMBER.search(found[2])
        key = number[1] if number else parts.get("num")
        if key is None:
            raise UserError(f"{where}: the topic has no <num> and no number")
        query = next((parts[name] for name in TOPIC_FIELDS if name in parts), None)
        if query is None:
            raise UserError(
                f"{where}: the topic has no {' or '.join(f'<{n}>' for n in TOPIC_FIELDS)}"
            )
        yield where, _clean(key), _clean(query)


def _clean(part: str) -> str:
    return html.unescape(_LABEL.sub("", part)).strip()


def _lines(path: Path, text: str) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            key, tab, query = line.partition("\t")
            if not tab:
                raise UserError(f"{path}:{number}: no tab; expected id, tab, query")
            yield f"{path}:{number}", key, query
