"""What `eval.data` reports of triples: their lengths, what repeats, and what leaks from tests."""

import collections
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from eval.description import TEXTS_AT_ONCE, Lengths, warning_lines
from expandr_jax.data.beir import judgements, read_texts
from expandr_jax.data.benchmarks import benchmark_queries, find_benchmarks, query_key
from expandr_jax.data.duplicates import near_duplicates
from expandr_jax.data.records import hash_json
from expandr_jax.data.triples import SUFFIXES, find_sources, stream_triples
from expandr_jax.errors import UserError
from expandr_jax.report.tables import render

PARTS = ("queries", "positives", "negatives")
SHOWN = 60  # Characters of a query in an example.


def holds_triples(path: pathlib.Path) -> bool:
    """Whether a path is of triples: a .jsonl[.gz] file, or a directory of some, and no BEIR's."""
    if path.is_dir():
        names = [file.name for file in path.iterdir() if file.is_file()]
    else:
        names = [path.name]
    files = [name for name in names if name.endswith(SUFFIXES)]
    return bool(files) and not any(
        name.startswith(("corpus.jsonl", "queries.jsonl")) for name in files
    )


def report_triples(
    path: pathlib.Path, lengths: Lengths, near: float, tests: Sequence[str]
) -> tuple[Table, list[str], list[UserError]]:
    """Reads triples once, line by line.

    Args:
        path: A directory of files, or one; see expandr_jax/data/triples.py.
        lengths: In what texts are measured.
        near: Least share of word 5-grams (Jaccard) that near-duplicates have in common.
        tests: Collections, as of `data.tests`, that must not be trained on.

    Returns:
        Lengths by file; what deserves a look, a line a kind; and each mistake in a line.

    Raises:
        UserError: There is no such file, one cannot be read at all, or `tests` are wrong.
    """
    files = find_sources(path)
    tested, documents = benchmark_queries(tests), _relevant_documents(tests)
    errors: list[UserError] = []
    counts: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    found: dict[str, list[str]] = {}
    seen: set[str] = set()
    rows, hits = _rows(files, errors), itertools.repeat([])
    if documents:
        rows, again = itertools.tee(rows)
        texts = (text for _, triple in again for text in triple.positives)
        hits = near_duplicates(texts, documents, near)
    while batch := list(itertools.islice(rows, TEXTS_AT_ONCE)):
        for source in dict.fromkeys(source for source, _ in batch):
            mine = [triple for name, triple in batch if name == source]
            counts[source, "queries"] += lengths.count([triple.query for triple in mine])
            for part in PARTS[1:]:
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
                    found.setdefault(what, []).append(f"{source}: {triple.query[:SHOWN]}")
            seen.add(hash_json(key))
    if not seen and not errors:
        raise UserError(f'{path}: no triples; expected {{"query", "pos", "neg"}} on each line')
    header, lines = ("file", "part", "texts", *lengths.header), []
    for source in files:
        for part in PARTS:
            mine = counts.get((source, part), ())
            name = source if part == PARTS[0] else ""
            lines.append([name, part, f"{len(mine):,}", *lengths.cells(mine)])
    return render(path.resolve().name, header, lines), warning_lines(found), errors


def _rows(files: Mapping[str, pathlib.Path], errors: list[UserError]) -> Iterator:
    """(source, triple) of each line that is right."""
    for source, file in files.items():
        for triple in stream_triples(file, errors.append):
            yield source, triple


def _relevant_documents(tests: Sequence[str]) -> list[str]:
    texts = []
    for benchmark in find_benchmarks(tests).values():
        judged = judgements(benchmark.files, benchmark.split)
        relevant = {judgement.document for judgement in judged if judgement.grade > 0}
        corpus = read_texts(benchmark.files, "corpus")
        texts += [text for document, text in corpus if document in relevant]
    return texts
