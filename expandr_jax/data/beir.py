"""Retrieval collections in the BEIR layout (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expandr_jax.data.records import read_jsonl, write_jsonl, write_text
from expandr_jax.errors import UserError

Qrels = dict[str, dict[str, int]]

_HEADER = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class Collection:
    """A corpus, its queries and their relevance judgements.

    Attributes:
        name: what results call it.
        corpus: document id -> title + " " + text, stripped.
        queries: query id -> text.
        qrels: split -> query id -> document id -> grade. A judged document may be absent from
            the corpus, as in several public sets: it counts as a relevant document that no
            system can find, which is what trec_eval does.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, Qrels]


def read_beir(directory: str | os.PathLike) -> Collection:
    """Reads a collection, named after its directory; a .jsonl may be compressed as .jsonl.gz.

    Documents may be empty and may lack a title; queries may lack judgements. The header of a
    qrels file is optional.

    Raises:
        UserError: a file is missing or a line is wrong (an id that is empty, has white space or
            appears twice; an empty query; a judgement of an unknown query or one that
            contradicts another; a grade that is no integer); it names file and line.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected a BEIR data set")
    corpus = _read_texts(_jsonl(directory, "corpus"))
    queries = _read_texts(_jsonl(directory, "queries"), allow_empty=False)
    splits = sorted(directory.glob("qrels/*.tsv"))
    if not splits:
        raise UserError(f"{directory}/qrels: no .tsv file; expected judgements as SPLIT.tsv")
    qrels = {path.stem: _read_qrels(path, queries) for path in splits}
    return Collection(directory.resolve().name, corpus, queries, qrels)


def write_beir(directory: str | os.PathLike, collection: Collection) -> None:
    """Writes a collection so that `read_beir` gives it back; same collection, same bytes."""
    directory = Path(directory)
    write_jsonl(
        directory / "corpus.jsonl",
        ({"_id": key, "title": "", "text": text} for key, text in collection.corpus.items()),
    )
    write_jsonl(
        directory / "queries.jsonl",
        ({"_id": key, "text": text} for key, text in collection.queries.items()),
    )
    for split, qrels in collection.qrels.items():
        lines = ["\t".join(_HEADER)]
        for query, judgements in qrels.items():
            lines += [f"{query}\t{document}\t{grade}" for document, grade in judgements.items()]
        write_text(directory / "qrels" / f"{split}.tsv", "\n".join(lines) + "\n")


def _jsonl(directory: Path, name: str) -> Path:
    plain, compressed = directory / f"{name}.jsonl", directory / f"{name}.jsonl.gz"
    return compressed if compressed.exists() and not plain.exists() else plain


def _read_texts(path: Path, allow_empty: bool = True) -> dict[str, str]:
    texts: dict[str, str] = {}
    for number, row in read_jsonl(path, {"_id": str, "text": str}):
        where, key, title = f"{path}:{number}", row["_id"], row.get("title") or ""
        if not isinstance(title, str):
            raise UserError(f'{where}: field "title" is not a string')
        if not key or key.split() != [key]:
            raise UserError(f'{where}: "_id" is {key!r}; expected an id without white space')
        if key in texts:
            raise UserError(f'{where}: "_id" {key!r} appears a second time; ids must be unique')
        texts[key] = f"{title} {row['text']}".strip()
        if not texts[key] and not allow_empty:
            raise UserError(f"{where}: query {key!r} is empty; give it a text or remove it")
    if not texts:
        raise UserError(f"{path}: empty; expected one JSON object a line")
    return texts


def _read_qrels(path: Path, queries: Mapping[str, str]) -> Qrels:
    qrels: Qrels = {}
    # Not the csv module: ids may hold quotes, which this format does not treat specially.
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from None
    for number, line in enumerate(lines, start=1):
        columns = tuple(line.rstrip("\r").split("\t"))
        if columns == ("",) or (number == 1 and columns == _HEADER):
            continue
        where = f"{path}:{number}"
        if len(columns) != 3 or not all(columns):
            raise UserError(f"{where}: {len(columns)} columns; expected query, document, grade")
        query, document, grade_text = columns
        try:
            grade = int(grade_text)
        except ValueError:
            raise UserError(f"{where}: grade {grade_text!r}; expected an integer") from None
        if query not in queries:
            raise UserError(f"{where}: query {query!r} is not among the queries")
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise UserError(f"{where}: {query!r} and {document!r} were judged otherwise above")
    if not qrels:
        raise UserError(f"{path}: no judgements; expected lines of query, document, grade")
    return qrels
