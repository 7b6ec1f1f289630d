"""Retrieval collections: the BEIR layout, as a directory or zip, and MTEB's with parquet files.

corpus.jsonl[.gz]    or corpus/*.parquet     _id (or id), title, text
queries.jsonl[.gz]   or queries/*.parquet    _id (or id), text; or TREC topics: topics.*
                                             (lines of JSON: answers, a list of strings, too)
qrels/SPLIT.tsv[.gz] or qrels/, default/ or data/ with SPLIT*.parquet; or qrels/SPLIT.trec

The hub's own conversion of a data set to parquet, with a folder more (corpus/corpus/0000.parquet,
default/test/0000.parquet), is read as well, and so is BRIGHT's layout (data/bright.py).
"""

import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expandr_jax.data import bright
from expandr_jax.data.answers import answers_of
from expandr_jax.data.documents import Documents, open_documents, seal, write_documents
from expandr_jax.data.judgements import (
    QRELS_HEADER,
    Judgement,
    Mistakes,
    Qrels,
    check_id,
    collect,
    columns_of,
    judgement_of,
)
from expandr_jax.data.parquet import on_disk, parquet_columns, read_parquet
from expandr_jax.data.places import only_collection
from expandr_jax.data.trec import read_topics
from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files
from expandr_jax.files.hashes import hash_once
from expandr_jax.files.records import (
    check_field,
    hash_json,
    note,
    parse_row,
    write_jsonl,
    write_text,
)

_COLUMNS = ("_id", "id", "title", "text", "instruction", *QRELS_HEADER)
_TABLES = ("qrels", "default", "data")  # Where sets on the Hugging Face hub keep judgements.
# What sets of MTEB's may have besides: candidates of each query, and what to search them for.
_UNREAD = re.compile(r"(top_ranked|instructions?)(/.*)?\.(jsonl?|tsv|parquet)(\.gz)?")


@dataclass(frozen=True)
class Collection:
    """A corpus, its queries and their relevance judgements.

    Attributes:
        name: what results call it.
        corpus: document id -> title + " " + text, stripped; on disk as `read_beir` gives it.
        queries: query id -> text, white space around it included; a title is no part of it.
        qrels: split -> query id -> document id -> grade. A judged document may be absent from
            the corpus, as in several public sets: it counts as a relevant document that no
            system can find, which is what trec_eval does.
        answers: query id -> strings of which a right answer has one, where the files have any.
        excluded: query id -> documents that leave its rankings before these are cut, where the
            files have any: `excluded_ids` of a query.
    """

    name: str
    corpus: Mapping[str, str]
    queries: dict[str, str]
    qrels: dict[str, Qrels]
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    excluded: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_beir(
    source: str | os.PathLike | Files,
    mistakes: Mistakes = None,
    *,
    store: str | os.PathLike | None = None,
    trusted: bool = False,
) -> Collection:
    """Reads a collection, named after its directory or archive; no text of its corpus is held.

    Documents may be empty and may lack a title; queries may lack judgements. The header of a
    qrels file is optional.

    Args:
        source: a directory, a .zip, or one of the collections that `find_collections` finds.
        mistakes: gets each mistake in a line, which is then left out; None raises the first.
        store: where the documents are kept, and found by whoever reads the same files again; None:
            in a temporary directory.
        trusted: another process has just seen that the store is there and whole.

    Raises:
        UserError: a file is missing or a line is wrong (an id that is empty, has white space or
            appears twice; an empty query; a judgement of an unknown query or one that
            contradicts another; a grade that is no integer; a relevant document that is excluded);
            it names file and line.
    """
    files = source if isinstance(source, Files) else only_collection(source)
    if unread := next(filter(_UNREAD.fullmatch, files.names), None):
        raise UserError(
            f"{files.path(unread)}: is not supported: queries are ranked against the whole corpus, "
            "by their texts alone; remove it to have that"
        )
    corpus = Documents(store) if trusted else _read_corpus(files, mistakes, store)
    answers: dict[str, tuple[str, ...]] = {}
    excluded: dict[str, tuple[str, ...]] = {}
    read = read_texts(files, "queries", mistakes, answers=answers, excluded=excluded)
    queries = dict(read)
    qrels = {}
    for split, names in _splits(files).items():
        before = len(mistakes or ())
        qrels[split] = collect(judgements(files, split, mistakes), queries, mistakes)
        if not qrels[split]:
            nothing = "no judgements; expected lines of query, document, grade"
            raise _first(mistakes, before, f"{files.path(names[0])}: {nothing}")
        for query, documents in excluded.items():
            for document in documents:
                if qrels[split].get(query, {}).get(document, 0) > 0:
                    both = f"{document!r} is relevant to query {query!r}, and excluded for it"
                    note(UserError(f"{files.path(names[0])}: document {both}"), mistakes)
    root = files.path("").resolve()
    name = root.stem if root.suffix.lower() == ".zip" else root.name
    return Collection(bright.task_name(files) or name, corpus, queries, qrels, answers, excluded)


def source_hashes(files: Files, splits: Container[str] | None = None) -> dict[str, str]:
    """The sha256 of each file that `read_beir` reads, or of the archive that holds them.

    `splits`: whose judgements count; None: all do.
    """
    if not files.root.is_dir():
        return {files.root.name: hash_once(files.root)}
    judged = [names for split, names in _splits(files).items() if splits is None or split in splits]
    parts = [_parts(files, "corpus"), _parts(files, "queries"), *judged]
    return {name: hash_once(files.path(name)) for part in parts for name in part}


def unread_judgements(files: Files, splits: Container[str]) -> set[str]:
    """Names of the files of judgements that `source_hashes` leaves out with these splits."""
    found = _splits(files)
    read = {name for split in found if split in splits for name in found[split]}
    return {name for names in found.values() for name in names} - read


def corpus_key(files: Files) -> str:
    """What a store of a collection's documents is told apart by: a hash of their files."""
    if not files.root.is_dir():
        return hash_json([files.folder, hash_once(files.root)])
    return hash_json({name: hash_once(files.path(name)) for name in _parts(files, "corpus")})


def read_texts(
    files: Files,
    kind: Literal["corpus", "queries"],
    mistakes: Mistakes = None,
    watched: Container[str] | None = None,
    answers: dict[str, tuple[str, ...]] | None = None,
    excluded: dict[str, tuple[str, ...]] | None = None,
) -> Iterator[tuple[str, str]]:
    """Reads documents, (id, title + " " + text), or queries, (id, text), one by one, checked.

    Args:
        files, kind, mistakes: what is read, and as `read_beir`.
        watched: ids of which a second one is a mistake; None: all, which are then held.
        answers, excluded: get those of queries that have some.

    Raises:
        UserError: As `read_beir`.
    """
    names, before, empty = _parts(files, kind), len(mistakes or ()), True
    seen: dict[str, str] = {}
    task = bool(bright.task_name(files))
    for name in names:
        for where, row in _rows(files, name, mistakes):
            try:
                if task:
                    row = bright.as_beir(where, row, kind == "queries")
                key, text = _text(where, row, kind)
                if task and kind == "corpus" and seen.get(key) == text:
                    continue  # A document that BRIGHT's files have twice counts once.
                if key in seen:
                    raise UserError(f'{where}: "_id" {key!r} appears a second time; make it unique')
                if not text.strip() and kind == "queries":
                    raise UserError(f"{where}: query {key!r} is empty; give it a text or remove it")
                if answers is not None and (own := answers_of(where, row)):
                    answers[key] = own
                if excluded is not None and (out := bright.excluded_of(where, row)):
                    excluded[key] = out
            except UserError as error:
                note(error, mistakes)
                continue
            if watched is None or key in watched:
                seen[key] = text
            empty = False
            yield key, text
    if empty:
        nothing = f"{files.path(names[0])}: empty; expected one JSON object a line"
        raise _first(mistakes, before, nothing)


def judgements(files: Files, split: str, mistakes: Mistakes = None) -> Iterator[Judgement]:
    """Reads the judgements of one split, line by line.

    Raises:
        UserError: There is no such split, or, where there are no `mistakes`, a line is wrong.
    """
    splits = _splits(files)
    if split not in splits:
        raise UserError(
            f"{files.path('qrels')}: no judgements of split {split!r}; there are "
            f"{', '.join(splits)}"
        )
    for name in splits[split]:
        yield from _read_judgements(files, name, mistakes)


def read_qrels(path: str | os.PathLike) -> Qrels:
    """Reads one file of judgements: .tsv[.gz] as in BEIR, .parquet, or else TREC's four columns.

    Raises:
        UserError: naming file and line, for a line that is wrong.
    """
    path = Path(path)
    files = Files(path.parent, "", (path.name,))
    return collect(_read_judgements(files, path.name, None), None, None)


def write_beir(directory: str | os.PathLike, collection: Collection) -> None:
    """Writes a collection so that `read_beir` gives it back; same collection, same bytes."""
    directory = Path(directory)
    write_jsonl(
        directory / "corpus.jsonl",
        ({"_id": key, "title": "", "text": text} for key, text in collection.corpus.items()),
    )
    write_jsonl(
        directory / "queries.jsonl",
        (
            {"_id": key, "text": text}
            | ({"answers": collection.answers[key]} if key in collection.answers else {})
            | ({"excluded_ids": collection.excluded[key]} if key in collection.excluded else {})
            for key, text in collection.queries.items()
        ),
    )
    for split, qrels in collection.qrels.items():
        lines = ["\t".join(QRELS_HEADER)]
        for query, judged in qrels.items():
            lines += [f"{query}\t{document}\t{grade}" for document, grade in judged.items()]
        write_text(directory / "qrels" / f"{split}.tsv", "\n".join(lines) + "\n")


def _read_corpus(files: Files, mistakes: Mistakes, store: str | os.PathLike | None) -> Documents:
    key = corpus_key(files) if store else ""
    if store and (found := open_documents(store, key)) is not None:
        return found
    before = len(mistakes or ())
    corpus = write_documents(read_texts(files, "corpus", mistakes, watched=()), store)
    if again := corpus.repeated():
        if mistakes is not None:
            del mistakes[before:]
        corpus = write_documents(read_texts(files, "corpus", mistakes, watched=again), store)
    if store:
        seal(store, key)
    return corpus


def _first(mistakes: Mistakes, before: int, otherwise: str) -> UserError:
    """Why a file holds nothing: its first mistake, when there were so many `before`, or else."""
    since = (mistakes or [])[before:]
    return since[0] if since else UserError(otherwise)


def _parts(files: Files, kind: str) -> list[str]:
    """The files that hold the corpus or the queries."""
    if bright.task_name(files):
        return bright.part_files(files, kind)
    # One parquet file by this name is not read, but would say the same again.
    whole = [f"{kind}.{ending}" for ending in ("jsonl", "jsonl.gz", "parquet")]
    whole = [name for name in whole if name in files.names]
    tables = [
        name for name in files.names if re.fullmatch(rf"{kind}/({kind}/)?[^/]+\.parquet", name)
    ]
    topics = [name for name in files.names if re.fullmatch(r"topics\.\w+", name)]
    found = [*whole, *tables[:1], *(topics if kind == "queries" else ())]
    if len(found) > 1:
        raise _beside(files, *found[:2])
    if not found or found == [f"{kind}.parquet"]:
        raise UserError(
            f"{files.path(kind + '.jsonl')}: cannot read it: No such file; expected it, "
            f"{kind}.jsonl.gz or {kind}/*.parquet"
        )
    return tables or found


def _splits(files: Files) -> dict[str, list[str]]:
    """The files that hold the judgements of each split."""
    if bright.task_name(files):
        return {"test": bright.part_files(files, "queries")}
    splits: dict[str, list[str]] = {}
    for kind in (r"\.tsv", r"\.tsv\.gz", r"\.trec"):
        for name in files.names:
            if found := re.fullmatch(rf"qrels/([^/.]+){kind}", name):
                if found[1] in splits:
                    raise _beside(files, *splits[found[1]], name)
                splits[found[1]] = [name]
    lines = {*splits}
    for folder in _TABLES:
        before = {*splits}  # Several of one folder are parts of a split.
        for name in files.names:
            if found := re.fullmatch(rf"{folder}/([^/]+?)(-\d+-of-\d+|/\d+)?\.parquet", name):
                if found[1] in before:
                    raise _beside(files, splits[found[1]][0], name)
                # Beside these, "data" may hold tables of anything.
                if lines and not {*QRELS_HEADER} <= {*parquet_columns(files, name)}:
                    continue
                splits.setdefault(found[1], []).append(name)
    if not splits:
        raise UserError(f"{files.path('qrels')}: no .tsv file; expected judgements as SPLIT.tsv")
    return dict(sorted(splits.items()))


def _beside(files: Files, one: str, other: str) -> UserError:
    return UserError(f"{files.path(other)}: stands beside {one}; remove one of them")


def _text(where: str, row: Mapping[str, Any], kind: str) -> tuple[str, str]:
    for name in ("_id", "text"):
        check_field(where, row, name, str)
    key, title = row["_id"], row.get("title") or ""
    if kind == "queries":
        if row.get("instruction"):
            raise UserError(f'{where}: field "instruction" is not read; put it into "text"')
        check_id(where, key)
        return key, row["text"]
    if not isinstance(title, str):
        raise UserError(f'{where}: field "title" is not a string')
    check_id(where, key)
    return key, f"{title} {row['text']}".strip()


def _rows(files: Files, name: str, mistakes: Mistakes) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The texts of one file: where each stands, and its fields."""
    if name.endswith(".parquet"):
        wanted = (bright.COLUMNS, bright.LISTS) if bright.is_part(name) else (_COLUMNS,)
        for where, row in read_parquet(files, name, *wanted):
            yield where, {"_id": row.get("id"), **row} if "_id" not in row else row
    elif name.startswith("topics."):
        for key, text in read_topics(on_disk(files, name)).items():
            yield f"{files.path(name)}: topic {key}", {"_id": key, "text": text}
    else:
        for number, line in files.lines(name):
            where = f"{files.path(name)}:{number}"
            if line.strip():
                try:
                    row = parse_row(where, line)
                except UserError as error:
                    note(error, mistakes)
                else:
                    yield where, row


def _read_judgements(files: Files, name: str, mistakes: Mistakes) -> Iterator[Judgement]:
    if bright.is_examples(name):
        yield from _gold(files, name, mistakes)
        return
    parquet = name.endswith(".parquet")
    rows = read_parquet(files, name, _COLUMNS) if parquet else files.lines(name)
    separator = "\t" if re.search(r"\.tsv(\.gz)?$", name) else None
    for position, row in rows:
        where = position if parquet else f"{files.path(name)}:{position}"
        try:
            if parquet:
                columns = [row.get(column) for column in QRELS_HEADER]
            else:
                columns = columns_of(where, row, separator)
                if not columns or (position == 1 and tuple(columns) == QRELS_HEADER):
                    continue
            judgement = judgement_of(where, columns)
        except UserError as error:
            note(error, mistakes)
        else:
            yield judgement


def _gold(files: Files, name: str, mistakes: Mistakes) -> Iterator[Judgement]:
    """The relevant documents of BRIGHT's queries."""
    for where, row in _rows(files, name, mistakes):
        try:
            query, documents = bright.gold_of(files, where, row)
        except UserError as error:
            note(error, mistakes)
        else:
            yield from (Judgement(where, query, document, 1) for document in documents)
