"""Checks a data set before any device time: `python -m eval.data DIR [--retriever=SOURCE]`.

Reads a BEIR directory or zip, MTEB's layout, or files of triples, and prints what is in it, what is
wrong with it (exit status 2, each mistake with its file and line) and what deserves a look: texts
and queries that stand twice, queries without judgements and judgements without documents, and what
leaks from test into training; for triples, from the collections of --tests=DIR,DIR. Lengths are in
tokens where --retriever names a model, in words otherwise.
"""

import pathlib
from collections.abc import Mapping, Sequence

from absl import flags
from rich.console import Console
from rich.table import Table

from eval.description import Lengths, token_lengths, warning_lines, word_lengths
from eval.triples import holds_triples, report_triples
from expandr_jax.data.archive import Files
from expandr_jax.data.beir import Collection, find_collections, judgements, read_beir
from expandr_jax.data.benchmarks import query_key
from expandr_jax.data.duplicates import near_duplicates
from expandr_jax.errors import UserError
from expandr_jax.report.tables import render, wide_console
from train.launch import launch

MOST_ERRORS = 20  # Lines that are printed; all mistakes are counted.
PARTS = ("corpus", "queries")


def describe(collection: Collection, lengths: Lengths) -> list[Table]:
    """Tables of what a collection holds: its texts, and the judgements of each split."""
    texts, splits = [], []
    for part in PARTS:
        values = list(getattr(collection, part).values())
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
    """What deserves a look, one line a kind, with how often and where.

    Args:
        collection: As `read_beir` read it.
        files: What it was read from.
        near: Least share of word 5-grams (Jaccard) that near-duplicates have in common.
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
            for row in judgements(files, split, lambda _: None)
            if row.document not in collection.corpus
        ]
    if {"train", "test"} <= collection.qrels.keys():
        found |= _leaks(collection, near)
    return warning_lines(found)


def _repeated(texts: Mapping[str, str]) -> list[str]:
    """Ids of texts that another, earlier one has word for word."""
    seen: set[str] = set()
    repeated = []
    for key, text in texts.items():
        plain = query_key(text)
        if plain and plain in seen:
            repeated.append(key)
        seen.add(plain)
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
        table, warnings, errors = report_triples(path, lengths, near, tests)
        console.print(table)
        _print_lines(warnings, errors, console)
        return len(errors)
    if tests:
        raise UserError(f"--tests goes with triples, and {path} has none; test judgements of a "
                        "collection are compared with its own train judgements")  # fmt: skip
    mistakes = 0
    for files in find_collections(path).values():
        errors: list[UserError] = []
        collection = read_beir(files, errors.append)
        for table in describe(collection, lengths):
            console.print(table)
        _print_lines(find_warnings(collection, files, near), errors, console)
        mistakes += len(errors)
    return mistakes


def _print_lines(warnings: Sequence[str], errors: Sequence[UserError], console: Console) -> None:
    for kind, lines in (("warning", warnings), ("error", map(str, errors[:MOST_ERRORS]))):
        for line in lines:
            console.print(f"{kind}: {line}", markup=False, soft_wrap=True)


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
