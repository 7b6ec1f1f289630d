"""Checks a data set before any device time: `python -m eval.data DIR [--retriever=SOURCE]`.

Reads a BEIR directory or zip, MTEB's layout, or files of triples, and prints what is in it, what is
wrong with it (exit status 2, each mistake with its file and line) and what deserves a look: texts
and queries that stand twice, queries without judgements and judgements without documents, and what
leaks from test into training; for triples, from the collections of --tests=DIR,DIR. Lengths are in
tokens where --retriever names a model, in words otherwise.
"""

import collections
import hashlib
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from absl import flags
from rich.console import Console
from rich.table import Table

from eval.description import (
    TEXTS_AT_ONCE,
    Lengths,
    token_lengths,
    warning_lines,
    word_lengths,
)
from expandr_jax.data.beir import Collection, judgements, read_beir, read_texts
from expandr_jax.data.benchmarks import benchmark_queries, find_benchmarks, query_key
from expandr_jax.data.documents import texts_of
from expandr_jax.data.duplicates import near_duplicates
from expandr_jax.data.places import find_collections
from expandr_jax.data.triples import TRIPLE_SUFFIXES, find_sources, stream_triples
from expandr_jax.errors import UserError
from expandr_jax.files.archive import Files
from expandr_jax.files.records import hash_json
from expandr_jax.report.tables import render, wide_console
from train.launch import launch

MOST_ERRORS = 20  # Lines that are printed; all mistakes are counted.
QUERY_CHARACTERS = 60  # Characters of a query in an example.
COLLECTION_PARTS = ("corpus", "queries")
TRIPLE_PARTS = ("queries", "positives", "negatives")


def describe(collection: Collection, lengths: Lengths) -> list[Table]:
    """Tables of what a collection holds: its texts, and the judgements of each split."""
    texts, splits = [], []
    for part in COLLECTION_PARTS:
        values = texts_of(getattr(collection, part))
        cells = [f"{len(values):,}", f"{sum(not value for value in values):,}"]
        texts.append([part, *cells, *lengths.cells(lengths.count(values))])
    for split, qrels in collection.qrels.items():
        grades = [grade for judged in qrels.values() for grade in judged.values()]
        relevant = sum(grade > 0 for grade in grades) / len(qrels)
        cells = [f"{len(qrels):,}", f"{len(grades):,}", f"{relevant:.2f}", f"{max(grades)}"]
        splits.append([split, *cells])
    header = ("split", "queries", "judgements", "relevant a query", "highest grade")
    return [
        render(collection.name, ("part", "texts", "empty", *lengths.header), texts),
        render("", header, splits),
    ]


def find_warnings(collection: Collection, files: Files, near: float) -> list[str]:
    """What deserves a look in a collection, read from these files: a line a kind, and where.

    Near-duplicates have more than a share of `near` of their word 5-grams (Jaccard) in common.
    """
    found = {
        "documents repeat the text of another": _repeated(collection.corpus),
        "queries repeat the text of another": _repeated(collection.queries),
        "queries are the text of the document with their own id (drop_identical_ids is for them)": [
            key  # The document has a title before it.
            for key, text in collection.queries.items()
            if collection.corpus.get(key, "").endswith(text)
        ],
        "queries have no judgement in any split": [
            query
            for query in collection.queries
            if not any(query in qrels for qrels in collection.qrels.values())
        ],
    }
    for split, qrels in collection.qrels.items():
        found[f"{split} queries have no relevant document in the corpus"] = [
            query
            for query, judged in qrels.items()
            if not any(g > 0 and d in collection.corpus for d, g in judged.items())
        ]
        found[f"{split} judgements are of documents that the corpus lacks"] = [
            f"{row.where} {row.document}"
            for row in judgements(files, split, [])
            if row.document not in collection.corpus
        ]
    if {"train", "test"} <= collection.qrels.keys():
        found |= _leaks(collection, near)
    return warning_lines(found)


def _repeated(texts: Mapping[str, str]) -> list[str]:
    """Ids of texts that another, earlier one has word for word."""
    seen: set[bytes] = set()  # Hashes: the texts may not fit.
    repeated = []
    for key, text in texts.items():
        plain = query_key(text)
        digest = hashlib.blake2b(plain.encode(), digest_size=16).digest()
        if plain and digest in seen:
            repeated.append(key)
        seen.add(digest)
    return repeated


def _leaks(collection: Collection, near: float) -> dict[str, list[str]]:
    """What stands in both train and test."""
    qrels, corpus = collection.qrels, collection.corpus
    queries = {s: {q: collection.queries[q] for q in qrels[s]} for s in ("train", "test")}
    documents = {
        split: {
            document: corpus[document]
            for judged in qrels[split].values()
            for document, grade in judged.items()
            if grade > 0 and document in corpus
        }
        for split in queries
    }
    trained = set(map(query_key, queries["train"].values()))
    same = documents["train"].keys() & documents["test"].keys()
    test = {key: text for key, text in documents["test"].items() if key not in same}
    names, first = list(test), {}
    # Documents of the test split are few, and those of train are read one by one.
    found = near_duplicates(documents["train"].values(), list(test.values()), near)
    for document, numbers in zip(documents["train"], found, strict=True):
        for number in numbers:
            first.setdefault(names[number], document)
    return {
        "test queries are train queries word for word": [
            key for key, text in queries["test"].items() if query_key(text) in trained
        ],
        "relevant test documents are relevant train documents": sorted(same),
        f"relevant test documents share over {near:g} of their 5-grams with a train document": [
            f"{key} with {first[key]}" for key in test if key in first
        ],
    }


def holds_triples(path: pathlib.Path) -> bool:
    """Whether a path is of triples: a .jsonl[.gz] file, or a directory of some, and no BEIR's."""
    if path.is_dir():
        names = [file.name for file in path.iterdir() if file.is_file()]
    else:
        names = [path.name]
    files = [name for name in names if name.endswith(TRIPLE_SUFFIXES)]
    return bool(files) and not any(
        name.startswith(("corpus.jsonl", "queries.jsonl")) for name in files
    )


def report_triples(
    path: pathlib.Path, lengths: Lengths, near: float, tests: Sequence[str]
) -> tuple[list[Table], list[str], list[UserError]]:
    """Reads triples once, line by line; arguments and errors are those of `check`.

    Returns:
        Lengths by file; what deserves a look, a line a kind; and each mistake in a line.
    """
    files = find_sources(path)
    tested, documents = benchmark_queries(tests), _relevant_documents(tests)
    errors: list[UserError] = []
    counts: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    rows = ((source, t) for source, file in files.items() for t in stream_triples(file, errors))
    hits = itertools.repeat([])
    if documents:
        rows, again = itertools.tee(rows)
        texts = (text for _, triple in again for text in triple.positives)
        hits = near_duplicates(texts, documents, near)
    while batch := list(itertools.islice(rows, TEXTS_AT_ONCE)):
        for source in dict.fromkeys(source for source, _ in batch):
            mine = [triple for name, triple in batch if name == source]
            counts[source, "queries"] += lengths.count([triple.query for triple in mine])
            for part in TRIPLE_PARTS[1:]:
                flat = [text for triple in mine for text in getattr(triple, part)]
                counts[source, part] += lengths.count(flat)
        for source, triple in batch:
            key = query_key(triple.query)
            near_to = [next(hits) for _ in triple.positives]
            for what, holds in (
                ("lines repeat the query of another", hash_json(key) in seen),
                ("lines have no negative", not triple.negatives),
                ("lines have a positive among their negatives",
                 not set(triple.positives).isdisjoint(triple.negatives)),
                ("lines have a test query, word for word", key in tested),
                (f"lines have a positive that shares over {near:g} of its 5-grams with a relevant "
                 "test document", any(near_to)),
            ):  # fmt: skip
                if holds:
                    found.setdefault(what, []).append(
                        f"{source}: {triple.query[:QUERY_CHARACTERS]}"
                    )
            seen.add(hash_json(key))
    if not seen and not errors:
        raise UserError(f'{path}: no triples; expected {{"query", "pos", "neg"}} on each line')
    header, lines = ("file", "part", "texts", *lengths.header), []
    for source in files:
        for part in TRIPLE_PARTS:
            mine = counts.get((source, part), ())
            name = source if part == TRIPLE_PARTS[0] else ""
            lines.append([name, part, f"{len(mine):,}", *lengths.cells(mine)])
    return [render(path.resolve().name, header, lines)], warning_lines(found), errors


def _relevant_documents(tests: Sequence[str]) -> list[str]:
    texts = []
    for benchmark in find_benchmarks(tests).values():
        judged = judgements(benchmark.files, benchmark.split)
        relevant = {judgement.document for judgement in judged if judgement.grade > 0}
        corpus = read_texts(benchmark.files, "corpus")
        texts += [text for document, text in corpus if document in relevant]
    return texts


def check(
    path: pathlib.Path,
    lengths: Lengths,
    near: float,
    console: Console,
    tests: Sequence[str] = (),
) -> int:
    """Prints everything about the collections or triples at a path.

    Args:
        path: As `find_collections` or `find_sources` reads it.
        lengths: In what texts are measured.
        near: Least share of word 5-grams (Jaccard) that near-duplicates have in common.
        console: Where it is printed.
        tests: Collections that triples must not have anything of.

    Returns:
        How many mistakes there are.

    Raises:
        UserError: A file is missing or cannot be read at all.
    """
    if holds_triples(path):
        return _show(*report_triples(path, lengths, near, tests), console)
    if tests:
        raise UserError(f"--tests goes with triples, and {path} has none; test judgements of a "
                        "collection are compared with its own train judgements")  # fmt: skip
    mistakes = 0
    for files in find_collections(path).values():
        errors: list[UserError] = []
        collection = read_beir(files, errors)
        warnings = find_warnings(collection, files, near)
        mistakes += _show(describe(collection, lengths), warnings, errors, console)
    return mistakes


def _show(
    tables: Sequence[Table], warnings: Sequence[str], errors: Sequence[UserError], console: Console
) -> int:
    """Prints what was found; returns how many mistakes there are."""
    for table in tables:
        console.print(table)
    for kind, lines in (("warning", warnings), ("error", map(str, errors[:MOST_ERRORS]))):
        for line in lines:
            console.print(f"{kind}: {line}", markup=False, soft_wrap=True)
    return len(errors)


def main(arguments: Sequence[str]) -> None:
    settings = flags.FLAGS
    if len(arguments) != 2:
        raise UserError("name one data set: python -m eval.data DIR [--retriever=SOURCE]")
    lengths = token_lengths(settings.retriever) if settings.retriever else word_lengths()
    path = pathlib.Path(arguments[1])
    mistakes = check(path, lengths, settings.near, wide_console(), settings.tests)
    if mistakes:
        lines = "1 line is" if mistakes == 1 else f"{mistakes:,} lines are"
        raise UserError(f"{path}: {lines} wrong; correct or remove them")


def define_flags() -> None:
    flags.DEFINE_string("retriever", None, "Model whose tokens are counted; words otherwise.")
    flags.DEFINE_float("near", 0.5, "Jaccard of 5-grams above which texts are near-duplicates.",
                       lower_bound=0.0, upper_bound=1.0)  # fmt: skip
    flags.DEFINE_list("tests", [], "Collections that triples must not have anything of.")


if __name__ == "__main__":
    launch(main, define_flags, words=True)
