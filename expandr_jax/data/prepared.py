"""Triples prepared once for each state of their files, then read at random, shuffled and mixed.

Each file is a source, such as the eight of echo-embeddings that the paper trains on. A query's part
(who trains on it, or dev, or test) depends on its text alone: wherever it stands, it falls to the
same.

A prepared set lies at ROOT/triples/LABEL-HASH/VERSION. HASH is of what the files hold, so that data
that changed are prepared anew, and never taken for what they were.
"""

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import tensorflow_datasets as tfds

from expandr_jax.data.triples import Triple, find_sources, stream_triples
from expandr_jax.errors import UserError
from expandr_jax.files.records import hash_file, hash_json

FILE_FORMAT = "array_record"  # The one that needs no TensorFlow.
_HASH_LENGTH = 16  # Hex digits in the directory's name; metadata.json has all.
_ROWS_AT_ONCE = 1000  # Between calls of a progress function.
_TEXT, _TEXTS = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
_FEATURES = {
    "query": _TEXT,
    "positives": _TEXTS,
    "negatives": _TEXTS,
    "expansions": _TEXTS,
    "teacher_scores": _TEXTS,  # As text: TFDS would keep half of a float64's digits.
}


class Triples(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Queries with positive and negative passages; a split for each file and part.

    Triples keep the order of their file. Splits without any are left out.

    Args:
        path: A directory of .jsonl[.gz] files, or one such file; see expandr_jax/data/triples.py.
        data_dir: The root of all prepared sets.
        shares: Part -> its share of the queries; they need not add up to 1.

    Attributes:
        files: Source -> file.
        identity: What the triples depend on: the files' sha256 by name, and the shares.

    Raises:
        UserError: There is no such file, or a share is wrong.
    """

    VERSION = tfds.core.Version("1.0.0")  # Raised when the features change.
    # TFDS would look for checksums of downloads beside the module, through a package that it does
    # not depend on.
    code_path = None

    def __init__(
        self, path: str | os.PathLike, *, data_dir: str | os.PathLike, shares: Mapping[str, float]
    ):
        if min(shares.values(), default=-1.0) < 0 or not sum(shares.values()):
            raise UserError(f"shares {dict(shares)}: expected some that are not below 0")
        self._shares = dict(shares)
        self.files = find_sources(path)
        hashes = {file.name: hash_file(file) for file in self.files.values()}
        self.identity = {"files": hashes, "shares": self._shares}
        self._progress: Callable[[int], None] = lambda count: None
        label = _tfds_name(Path(path).resolve().name)
        name = f"{label}-{hash_json(self.identity)[:_HASH_LENGTH]}"
        with _quiet():
            super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=name))

    def prepare(self, progress: Callable[[int], None] | None = None) -> tfds.core.DatasetBuilder:
        """Writes the triples unless they are there already.

        Several processes may call it at once: one of them writes.

        Args:
            progress: Called with the number of triples written since its last call.

        Raises:
            UserError: A line of a file is wrong, or the directory cannot be written.
        """
        self._progress = progress or self._progress
        with _locked(self.data_path.parent):
            if not (self.data_path / "dataset_info.json").exists():
                for left in Path(self.data_path.parent).glob("incomplete.*"):  # After a kill.
                    shutil.rmtree(left)
                with _quiet():
                    self.download_and_prepare(file_format=FILE_FORMAT)
        with _quiet():
            return tfds.builder_from_directory(self.data_path)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(_FEATURES),
            metadata=tfds.core.MetadataDict(source=self.identity),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        """Each file is read once for each part."""
        started = {}
        for (source, file), part in itertools.product(self.files.items(), self._shares):
            name = split_name(source, part)
            rows = self._generate_examples(file, part)
            for first in rows:  # TFDS refuses a split without rows.
                if name in started:
                    raise UserError(f"{name}: a second split of this name; rename one")
                started[name] = itertools.chain([first], rows)
                break
        return started

    def _generate_examples(self, file: Path, part: str) -> Iterator[tuple[int, dict]]:
        triples = (t for t in stream_triples(file) if part_of(t.query, self._shares) == part)
        number = 0
        for number, triple in enumerate(triples, start=1):
            if number % _ROWS_AT_ONCE == 0:
                self._progress(_ROWS_AT_ONCE)
            row = {name: getattr(triple, name) for name in _FEATURES}
            yield number, row | {"teacher_scores": list(map(repr, triple.teacher_scores or ()))}
        self._progress(number % _ROWS_AT_ONCE)

    # The caller shows progress: TFDS would print.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def split_name(source: str, part: str) -> str:
    """What TFDS calls the triples of one source and part."""
    return _tfds_name(f"{source}_{part}")


def part_of(query: str, shares: Mapping[str, float]) -> str:
    """Which part a query falls to; the greater a part's share, the more do."""
    digest = hashlib.sha256(f"part:{' '.join(query.split())}".encode()).digest()
    bounds = list(itertools.accumulate(shares.values()))
    draw = int.from_bytes(digest[:6]) / 2**48 * bounds[-1]
    return next(part for part, bound in zip(shares, bounds, strict=True) if draw < bound)


def read_split(prepared: tfds.core.DatasetBuilder, split: str) -> grain.MapDataset:
    """The triples of a split in the order of their file, each read when it is asked for.

    `prepared` is from `Triples.prepare`, and `split` one that it has, by its `split_name`.
    """
    return grain.MapDataset.source(_Source(prepared, split))


def shuffled(
    parts: Sequence[grain.MapDataset], *, seed: int, weights: Sequence[float] | None = None
) -> grain.MapDataset:
    """Triples of several sources in an order of the seed's, another in each epoch.

    Args:
        parts: From `read_split`.
        seed: Seed of the order.
        weights: The sources' shares of the triples, interleaved evenly. An epoch ends when the
            first source does, so that no triple stands in it twice. None: all of all sources.

    Raises:
        UserError: The weights do not fit.
    """
    if weights is None:
        return grain.MapDataset.concatenate(list(parts)).shuffle(seed)
    if len(weights) != len(parts) or min(weights) <= 0:
        raise UserError(f"weights {tuple(weights)} of {len(parts)} sources; expected one each, > 0")
    each = [part.shuffle(seed + number) for number, part in enumerate(parts)]
    return grain.MapDataset.mix(each, list(weights))


class _Source:
    """Random access to the triples of one split."""

    def __init__(self, prepared: tfds.core.DatasetBuilder, split: str):
        self._directory = str(prepared.data_path)
        self._source = prepared.as_data_source(split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Triple:
        try:
            row = self._source[index]
        except RuntimeError as error:  # array_record's own, of a checksum or a length.
            reason = str(error).split(";")[0][:200]
            raise UserError(
                f"{self._directory}: row {index} is damaged ({reason}); delete this directory, and "
                "it is prepared again"
            ) from None
        query = row.pop("query").decode()
        texts = {name: tuple(text.decode() for text in row[name]) for name in row}
        scores = tuple(map(float, texts.pop("teacher_scores")))
        return Triple(query, **texts, teacher_scores=scores or None)

    def __repr__(self) -> str:  # grain writes it into its messages.
        return f"{self._directory} ({len(self)} rows)"


def _tfds_name(text: str) -> str:
    """A name as TFDS allows it: letters, digits and underscores, and not "all"."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in text)
    return f"{name}_" if name.lower() == "all" else name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS from warning that a set is none of its own, and from drawing bars."""
    log = logging.getLogger("absl")  # TFDS's own.
    before = log.level
    log.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _locked(directory: Any) -> Iterator[None]:
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with open(Path(directory) / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise UserError(
            f"{directory}: cannot prepare data there: {error.strerror or error}"
        ) from error
