"""Prepares rows of text once for each state of their source, in files that are read at random.

A prepared set lies at ROOT/BUILDER/LABEL-HASH/VERSION. HASH is of what the source's files hold, so
that data that changed are prepared anew, and never taken for what they were.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from expandr_jax.data.records import hash_json
from expandr_jax.errors import UserError

Row = dict[str, Any]
Progress = Callable[[int], None]

FORMAT = "array_record"  # The one that needs no TensorFlow.
_HASH_LENGTH = 16  # Hex digits in the directory's name; metadata.json has all.
_ROWS_AT_ONCE = 1000  # Between calls of a progress function.


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A set of rows with the same fields, in one or several splits.

    Rows keep the order of their source. Splits without rows are left out.

    Args:
        data_dir: The root of all prepared sets.
        label: What its directory is called, before the hash.
        identity: Everything that the rows depend on: sha256 of files by name, and settings.
    """

    VERSION = tfds.core.Version("1.0.0")  # Raised when the fields change.
    FIELDS: ClassVar[Mapping[str, Any]]
    # TFDS would look for checksums of downloads beside the module, through a package that it does
    # not depend on.
    code_path = None

    def __init__(self, *, data_dir: str | os.PathLike, label: str, identity: Mapping[str, Any]):
        self.identity = dict(identity)
        self._progress: Progress = lambda count: None
        name = f"{tfds_name(label)}-{hash_json(self.identity)[:_HASH_LENGTH]}"
        with _quiet():
            super().__init__(data_dir=data_dir, config=tfds.core.BuilderConfig(name=name))

    @abstractmethod
    def splits(self) -> Mapping[str, Iterable[Row]]:
        """The rows of each split, each of which is iterated over once."""

    def prepare(self, progress: Progress | None = None) -> tfds.core.DatasetBuilder:
        """Writes the rows unless they are there already.

        Several processes may call it at once: one of them writes.

        Args:
            progress: Called with the number of rows written since its last call.

        Returns:
            The prepared set, which knows its directory alone: workers can be given it.

        Raises:
            UserError: A line of the source is wrong, or the directory cannot be written.
        """
        if progress is not None:
            self._progress = progress
        with _locked(self.data_path.parent):
            if not (self.data_path / "dataset_info.json").exists():
                for left in Path(self.data_path.parent).glob("incomplete.*"):  # After a kill.
                    shutil.rmtree(left)
                with _quiet():
                    self.download_and_prepare(file_format=FORMAT)
        with _quiet():
            return tfds.builder_from_directory(self.data_path)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(dict(self.FIELDS)),
            metadata=tfds.core.MetadataDict(source=self.identity),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, Row]]]:
        started = {}
        for name, rows in self.splits().items():
            rows = iter(rows)
            for first in rows:  # TFDS refuses a split without rows.
                if tfds_name(name) in started:
                    raise UserError(f"{name}: a second split of this name; rename one")
                started[tfds_name(name)] = self._generate_examples(itertools.chain([first], rows))
                break
        return started

    def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
        number = 0
        for number, row in enumerate(rows, start=1):
            if number % _ROWS_AT_ONCE == 0:
                self._progress(_ROWS_AT_ONCE)
            yield number, row
        self._progress(number % _ROWS_AT_ONCE)

    # The caller shows progress: TFDS would print.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def tfds_name(text: str) -> str:
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
