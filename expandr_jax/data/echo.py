"""A collection made of triples, such as the eight files of echo-embeddings that the paper uses."""

import dataclasses
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from expandr_jax.data.beir import Collection
from expandr_jax.data.benchmarks import query_key
from expandr_jax.data.documents import write_documents
from expandr_jax.data.download import data_path
from expandr_jax.data.duplicates import near_duplicates
from expandr_jax.data.prepared import Triples, read_split, shuffled, split_name
from expandr_jax.data.settings import DataSettings
from expandr_jax.data.training_data import TrainingData
from expandr_jax.data.triples import Triple
from expandr_jax.errors import UserError
from expandr_jax.runtime.progress import Reporter

HELD_OUT = ("dev", "test")
TRAINING_PARTS = ("retriever_train", "generator_train")
ID_LENGTH = 24  # Hex digits of a text's hash: 96 bits, so that no two texts share them.
JACCARD = 0.5  # Similarity of word 5-grams above which a document is a near-duplicate.


def read_echo(
    config: DataSettings,
    prepared_in: str | os.PathLike,
    store: str | os.PathLike,
    reporter: Reporter,
) -> TrainingData:
    """Makes a collection of the config's triples; their passages are the corpus.

    Given negatives are judged 0. Which rows are taken where the config limits their number depends
    on the files alone. Training queries are left out where the held-out share has the same query,
    or where their document is nearly that of a held-out query.

    They are prepared in `prepared_in`, unless the config says where, and read one by one; the
    passages go to a store of documents, unsealed. Raises UserError where the files or the config's
    weights cannot be used.
    """
    path = data_path(config, reporter)
    root = config.prepared or prepared_in
    # Which part a query falls to depends on their order.
    shares = dict(sorted(dataclasses.asdict(config.shares).items()))
    builder = Triples(path, data_dir=root, shares=shares)
    with reporter.progress("triples prepared", _lines(builder)) as advance:
        prepared = builder.prepare(advance)
    held_out = [t for part in HELD_OUT for t in _take(config, reporter, builder, prepared, part)]
    known = {query_key(triple.query) for triple in held_out}
    documents = list({text for triple in held_out for text in triple.positives})
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, dict[str, int]]] = {"train": {}, "dev": {}, "test": {}}
    ids: dict[str, dict[str, None]] = {part: {} for part in (*TRAINING_PARTS, *HELD_OUT)}
    rows: Counter[str] = Counter()
    left_out = 0

    def kept() -> Iterator[Triple]:
        """Yields triples that are not left out, and notes their queries and judgements."""
        nonlocal left_out
        for part in ids:
            triples = _take(config, reporter, builder, prepared, part)
            judged = qrels["train" if part in TRAINING_PARTS else part]
            flagged = _leaks(triples, known, documents) if part in TRAINING_PARTS else _all(triples)
            for triple, drop in flagged:
                rows[part] += 1
                left_out += drop
                if drop:
                    continue
                query = _id(triple.query)
                queries[query] = triple.query.strip()
                ids[part][query] = None
                grades = judged.setdefault(query, {})
                for text in triple.negatives:
                    grades.setdefault(_id(text), 0)
                for text in triple.positives:  # Relevant in one line is relevant in all.
                    grades[_id(text)] = 1
                yield triple

    corpus = write_documents(_passages(kept()), store)
    reporter.say(f"{left_out} training queries left out: a held-out query is like them")
    name = path.resolve().name
    source = {
        "name": name,
        **builder.identity,
        "weights": dict(config.weights),
        "rows": {part: rows[part] for part in ids},
        "left_out": left_out,
    }
    trained = (list(ids[part]) for part in TRAINING_PARTS)
    return TrainingData(Collection(name, corpus, queries, qrels), *trained, source)


def _passages(triples: Iterable[Triple]) -> Iterator[tuple[str, str]]:
    """(Id, text) of each different passage, where it first stands."""
    seen = set()
    for triple in triples:
        for text in (*triple.positives, *triple.negatives):
            if (document := _id(text)) not in seen:
                seen.add(document)
                yield document, text.strip()


def _take(
    config: DataSettings, reporter: Reporter, builder: Triples, prepared: Any, part: str
) -> Iterator[Triple]:
    """The first triples of a part in a fixed shuffle, as many as the config allows."""
    weights = dict(config.weights)
    if unknown := set(weights) - set(builder.files):
        raise UserError(
            f"data.weights: no file of {', '.join(sorted(unknown))}; there are "
            f"{', '.join(builder.files)}"
        )
    splits = {s: split_name(s, part) for s in builder.files if not weights or s in weights}
    present = {s: name for s, name in splits.items() if name in prepared.info.splits}
    if not present:
        return
    data = shuffled(
        [read_split(prepared, name) for name in present.values()],
        seed=0,  # Not the config's: seeds are compared on the same data.
        weights=[weights[source] for source in present] if weights else None,
    )
    count = min(getattr(config, f"max_{part}") or len(data), len(data))
    with reporter.progress(f"{part}: rows read", count) as advance:
        for i in range(count):
            yield data[i]
            advance(1)


def _lines(builder: Triples) -> int:
    """An estimate of the number of rows, for the progress display."""
    total = 0
    for file in builder.files.values():
        with open(file, "rb") as stream:
            sample = stream.read(1 << 20)
        # Compressed files are a guess at best, which only the estimate shows.
        total += max(1, sample.count(b"\n") * file.stat().st_size // max(1, len(sample)))
    return total


def _leaks(
    triples: Iterable[Triple], known: set[str], documents: Sequence[str]
) -> Iterator[tuple[Triple, bool]]:
    """Triples, and whether each is like a held-out query's."""
    triples, ahead = itertools.tee(triples)
    near = near_duplicates((x for t in ahead for x in t.positives), documents, JACCARD)
    for triple in triples:
        hits = [next(near) for _ in triple.positives]  # All of them, so that the next's come next.
        yield triple, any(hits) or query_key(triple.query) in known


def _all(triples: Iterable[Triple]) -> Iterator[tuple[Triple, bool]]:
    return ((triple, False) for triple in triples)


def _id(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:ID_LENGTH]
