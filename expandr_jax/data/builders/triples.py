"""Triples from several files, such as the eight of echo-embeddings that the paper trains on.

Each file is a source. A query's part (who trains on it, or dev, or test) depends on its text alone:
wherever it stands, it falls to the same.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from expandr_jax.data.builders.prepare import Row, TextBuilder
from expandr_jax.data.records import hash_file
from expandr_jax.data.triples import Triple, find_sources, stream_triples
from expandr_jax.errors import UserError

_TEXT, _TEXTS = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())


class Triples(TextBuilder, skip_registration=True):
    """Queries with positive and negative passages; a split SOURCE_PART for each file and part.

    Args:
        path: A directory of .jsonl[.gz] files, or one such file; see expandr_jax/data/triples.py.
        data_dir: The root of all prepared sets.
        shares: Part -> its share of the queries; they need not add up to 1.

    Raises:
        UserError: There is no such file, or a share is wrong.
    """

    FIELDS: ClassVar = {
        "query": _TEXT,
        "positives": _TEXTS,
        "negatives": _TEXTS,
        "expansions": _TEXTS,
        "teacher_scores": _TEXTS,  # As text: TFDS would keep half of a float64's digits.
    }

    def __init__(
        self, path: str | os.PathLike, *, data_dir: str | os.PathLike, shares: Mapping[str, float]
    ):
        if min(shares.values(), default=-1.0) < 0 or not sum(shares.values()):
            raise UserError(f"shares {dict(shares)}: expected some that are not below 0")
        self._shares = dict(shares)
        self.files = find_sources(path)
        hashes = {file.name: hash_file(file) for file in self.files.values()}
        identity = {"files": hashes, "shares": self._shares}
        super().__init__(data_dir=data_dir, label=Path(path).resolve().name, identity=identity)

    def splits(self) -> Mapping[str, Iterable[Row]]:
        """Those of each file, which is read once for each part."""
        return {
            split_name(source, part): self._rows(file, part)
            for source, file in self.files.items()
            for part in self._shares
        }

    def _rows(self, file: Path, part: str) -> Iterator[Row]:
        for triple in stream_triples(file):
            if part_of(triple.query, self._shares) == part:
                yield {
                    "query": triple.query,
                    "positives": list(triple.positives),
                    "negatives": list(triple.negatives),
                    "expansions": list(triple.expansions),
                    "teacher_scores": [repr(score) for score in triple.teacher_scores or ()],
                }


def split_name(source: str, part: str) -> str:
    """What TFDS calls the rows of one source and part."""
    return f"{source}_{part}"


def part_of(query: str, shares: Mapping[str, float]) -> str:
    """Which part a query falls to; the greater a part's share, the more do."""
    digest = hashlib.sha256(f"part:{' '.join(query.split())}".encode()).digest()
    bounds = list(itertools.accumulate(shares.values()))
    draw = int.from_bytes(digest[:6]) / 2**48 * bounds[-1]
    return next(part for part, bound in zip(shares, bounds, strict=True) if draw < bound)


def to_triple(row: Row) -> Triple:
    """A row as `rows` of stream.py gives it, as `read_triples` would."""
    scores = row["teacher_scores"]
    return Triple(
        row["query"],
        tuple(row["positives"]),
        tuple(row["negatives"]),
        tuple(row["expansions"]),
        tuple(map(float, scores)) if scores else None,
    )
