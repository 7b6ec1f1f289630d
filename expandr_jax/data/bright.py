"""BRIGHT's layout on the Hugging Face hub, read as collections (Su et al., arXiv 2407.12883).

documents/TASK-*.parquet       id, content
long_documents/TASK-*.parquet  the same, where a task has whole pages
examples/TASK-*.parquet        id, query, excluded_ids, gold_ids, gold_ids_long

or .jsonl, .jsonl.gz. Each task is a collection of one split, "test": TASK with its documents,
TASK-long with its long ones. Documents of `excluded_ids` leave a query's ranking before it is cut,
as its authors and Pyserini have it; queries without gold documents are not judged. White space in
ids, for which TREC's files have no room, becomes "_", as those who write such files have it.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from expandr_jax.errors import UserError, shown
from expandr_jax.files.archive import Files
from expandr_jax.files.records import check_field

COLUMNS = ("id", "content", "query")
LISTS = ("excluded_ids", "gold_ids", "gold_ids_long")
LONG_SUFFIX = "-long"
_EXAMPLES, _DOCUMENTS, _LONG_DOCUMENTS = "examples", "documents", "long_documents"
_FILE = re.compile(
    rf"({_EXAMPLES}|{_DOCUMENTS}|{_LONG_DOCUMENTS})/([^/]+?)(?:-\d+-of-\d+|/\d+)?"
    r"\.(?:parquet|jsonl|jsonl\.gz)"
)
_NOTHING = "N/A"  # Stands where a list of ids is empty.


def find_tasks(files: Files) -> dict[str, Files]:
    """The files of each task by name, those with long documents as TASK-long; {}: another layout.

    Raises:
        UserError: There are documents without examples.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in files.names:
        if match := _FILE.fullmatch(name):
            found.setdefault(match[2], {}).setdefault(match[1], []).append(name)
    if not any(_EXAMPLES in parts for parts in found.values()):
        return {}
    tasks = {}
    for task, parts in found.items():
        for kind, end in ((_DOCUMENTS, ""), (_LONG_DOCUMENTS, LONG_SUFFIX)):
            if kind in parts:
                if _EXAMPLES not in parts:
                    where = files.path(f"{_EXAMPLES}/{task}")
                    raise UserError(f"{where}: no such file; expected the queries of {kind}/{task}")
                names = (*parts[_EXAMPLES], *parts[kind])
                tasks[task + end] = dataclasses.replace(files, names=tuple(sorted(names)))
    return tasks


def task_name(files: Files) -> str:
    """What a task's files are called as a collection; "" for files of another layout."""
    matches = [match for name in files.names if (match := _FILE.fullmatch(name))]
    if not any(match[1] == _EXAMPLES for match in matches):
        return ""
    return matches[0][2] + (LONG_SUFFIX if _is_long(files) else "")


def is_examples(name: str) -> bool:
    """Whether a file holds a task's queries."""
    return name.startswith(f"{_EXAMPLES}/")


def is_part(name: str) -> bool:
    """Whether a file may be one of a task's."""
    return bool(_FILE.fullmatch(name))


def part_files(files: Files, kind: str) -> list[str]:
    """A task's files that hold the corpus or the queries."""
    return [name for name in files.names if is_examples(name) == (kind == "queries")]


def as_beir(where: str, row: Mapping[str, Any], is_query: bool) -> dict[str, Any]:
    """A query or a document with the fields that BEIR's have.

    UserError, naming `where`, for one that lacks a field.
    """
    text = "query" if is_query else "content"
    for name in ("id", text):
        check_field(where, row, name, str)
    found = {"_id": _plain(row["id"]), "text": row[text]}
    return found | ({"excluded_ids": _ids(where, row, "excluded_ids")} if is_query else {})


def gold_of(files: Files, where: str, row: Mapping[str, Any]) -> tuple[str, list[str]]:
    """A query's id and its relevant documents, which are of the corpus that the files have."""
    check_field(where, row, "id", str)
    return _plain(row["id"]), _ids(where, row, "gold_ids_long" if _is_long(files) else "gold_ids")


def excluded_of(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """The documents that leave a query's ranking, of a line of queries; none without such a field.

    UserError, naming `where`, for what is no list of ids.
    """
    if row.get("excluded_ids") is None:
        return ()
    return tuple(_ids(where, row, "excluded_ids"))


def _ids(where: str, row: Mapping[str, Any], name: str) -> list[str]:
    ids: Sequence[str] | None = row.get(name)
    if not isinstance(ids, list) or not all(isinstance(one, str) and one.strip() for one in ids):
        raise UserError(f'{where}: field "{name}" is {shown(ids)}; expected a list of ids')
    return [_plain(one) for one in ids if one != _NOTHING]


def _plain(name: str) -> str:
    return re.sub(r"\s", "_", name)


def _is_long(files: Files) -> bool:
    return any(name.startswith(f"{_LONG_DOCUMENTS}/") for name in files.names)
