"""Finds the collections of a directory or zip by their names.

A directory in BRIGHT's layout holds one for each task, of its documents: those of the long ones are
DIR:long, one task DIR:biology or DIR:biology-long.
"""

import os
import re
from pathlib import Path

from expandr_jax.data import bright
from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files, list_files

COLLECTION_GROUPS = ("cqadupstack",)  # Folders whose collections the field's tables report as one.
_CORPUS = re.compile(r"(.*?/)??corpus(?:\.jsonl(?:\.gz)?|(?:/corpus)?/[^/]+\.parquet)")


def find_collections(path: str | os.PathLike) -> dict[str, Files]:
    """The collections of a directory or zip: the one it is, or those in its folders.

    Returns:
        Name -> files. BRIGHT's are named by their tasks, several others by their folders; those in
        one of `COLLECTION_GROUPS`, which count as one set, "cqadupstack/android" and so on.

    Raises:
        UserError: There is no such path or task, the archive cannot be read, or two have the same
            name.
    """
    path, chosen = _chosen(path)
    files = list_files(path)
    if tasks := bright.find_tasks(files):
        return _tasks(path, tasks, chosen)
    if chosen:
        raise UserError(f"{path}: no tasks as BRIGHT has them, of which {chosen!r} were one")
    matches = (_CORPUS.fullmatch(name) for name in files.names)
    folders = sorted({match[1] or "" for match in matches if match})
    name = Path(path).resolve().name.removesuffix(".zip")
    if "" in folders or not folders:
        return {name: files}
    if len(folders) == 1:
        return {Path(folders[0]).name: files.below(folders[0])}
    found: dict[str, Files] = {}
    for folder in folders:
        *above, last = name, *Path(folder).parts
        family = next((f for f in COLLECTION_GROUPS if above[-1].lower() == f), None)
        label = f"{family}/{last}" if family else last
        if label in found:
            raise UserError(f"{path}: two of its collections are called {label!r}; rename one")
        found[label] = files.below(folder)
    return found


def _chosen(path: str | os.PathLike) -> tuple[str | os.PathLike, str]:
    """A path, and what a colon behind it chooses of it."""
    before, colon, chosen = str(path).rpartition(":")
    if not (colon and before and chosen) or Path(path).exists() or not Path(before).exists():
        return path, ""
    return before, chosen


def _tasks(path: str | os.PathLike, tasks: dict[str, Files], chosen: str) -> dict[str, Files]:
    """BRIGHT's tasks that are chosen: "", "long" or the name of one."""
    if chosen in tasks:
        return {chosen: tasks[chosen]}
    if chosen not in ("", "long"):
        raise UserError(f"{path}: no task {chosen!r}; there are {', '.join(sorted(tasks))}")
    found = {name: files for name, files in tasks.items()
             if name.endswith(bright.LONG_SUFFIX) == bool(chosen)}  # fmt: skip
    if not found:
        which = "long documents" if chosen else "documents"
        raise UserError(f"{path}: no {which}; there are {', '.join(sorted(tasks))}")
    return dict(sorted(found.items()))


def only_collection(path: str | os.PathLike) -> Files:
    """The files of the one collection at a path.

    Raises:
        UserError: There are several, or as `find_collections`.
    """
    found = find_collections(path)
    if len(found) > 1:
        raise UserError(f"{path}: holds {len(found)} collections; name one: {', '.join(found)}")
    return next(iter(found.values()))
