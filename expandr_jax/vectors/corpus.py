"""Texts as vectors, each process encoding its share, and a corpus of them with its index."""

import contextlib
import dataclasses
import functools
import glob
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.errors import NotFiniteError
from expandr_jax.runtime.processes import Processes
from expandr_jax.runtime.progress import Reporter
from expandr_jax.search import Index, build_index
from expandr_jax.search.settings import SearchSettings
from expandr_jax.vectors.encoder import Kind, Progress, TextEncoder
from expandr_jax.vectors.file import encode_to_file
from expandr_jax.vectors.stored import StoredVectors, open_vectors


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The corpus as the current retriever sees it.

    Attributes:
        ids: Document ids, in the order of the index.
        vectors: [documents, dim], float32 when indexed or stored in less; process 0 has them.
        search: The config's section `search`.
    """

    ids: list[str]
    vectors: np.ndarray | StoredVectors | None
    search: SearchSettings

    @functools.cached_property
    def index(self) -> Index:
        """Search over the vectors; made when asked for, as one process alone does."""
        backend = self.search.backend
        options = {
            **(vars(self.search.exact) if backend != "scann" else {}),
            **(vars(self.search.scann) if backend != "exact" else {}),
        }
        return build_index(self.vectors, backend, **options)


def encode_corpus(
    encoder: TextEncoder,
    params: Any,
    texts: Mapping[str, str],
    path: pathlib.Path,
    *,
    dtype: str,
    search: SearchSettings,
    processes: Processes,
    reporter: Reporter,
) -> Corpus:
    """Encodes documents, id -> text, each process a share of them, and opens them for searching.

    Args:
        encoder, params, path, dtype: As for `encode_to_file`.
        texts: Document id -> text.
        search: The config's section `search`.
        processes: Those that encode.
        reporter: Shows progress.

    Raises:
        NotFiniteError: A vector is not finite, naming its document.
    """
    encode = functools.partial(encode_to_file, encoder=encoder, params=params, kind="document")
    with reporter.progress(f"{path.stem}: documents encoded", len(texts)) as shown:

        def advance(count: int) -> None:
            shown(count)
            processes.files.push(later=True)

        _encode_shares(processes, path, texts, encode, dtype, advance)
    corpus = Corpus(list(texts), open_vectors(path) if processes.is_main else None, search)
    if processes.is_main:
        _ = corpus.index
    return corpus


def _encode_shares(
    processes: Processes,
    path: pathlib.Path,
    texts: Mapping[str, str],
    encode: Callable[..., Any],
    dtype: str,
    advance: Progress,
) -> None:
    """Makes a file of vectors, where there are several processes of what each has encoded."""
    ids, values = list(texts), list(texts.values())
    starts = _starts(len(values), processes.count)
    names = [f"{path.name}.process-{i}-of-{processes.count}" for i in range(processes.count)]
    parts = [path.with_name(name) for name in names]
    divided = processes.count > 1 and not processes.once(path.exists)
    if divided:
        share = slice(starts[processes.index], starts[processes.index + 1])
        if values[share]:
            with _naming(ids[share], "document "):
                encode(parts[processes.index], texts=values[share], progress=advance)
        processes.barrier()

    def known(start: int, end: int) -> np.ndarray:
        """Vectors of documents from the processes' files."""
        rows = []
        for part, first, last in zip(parts, starts, starts[1:], strict=False):
            if max(start, first) < min(end, last):
                rows.append(open_vectors(part)[max(start, first) - first : min(end, last) - first])
        return np.concatenate(rows)

    def join() -> None:
        # What is damaged of a file that was there, process 0 encodes by itself.
        made = {"vectors": known} if divided else {"progress": advance}
        with _naming(ids, "document "):
            encode(path, texts=values, dtype=dtype, **made)
        remove()

    def remove() -> None:
        for file in path.parent.glob(f"{glob.escape(path.name)}.process-*"):
            file.unlink(missing_ok=True)

    processes.once(join)
    remove()  # Each its own, where they have no directory in common.


def encode_texts(
    encoder: TextEncoder,
    params: Any,
    texts: Sequence[str],
    kind: Kind,
    processes: Processes,
    directory: pathlib.Path,
    progress: Progress | None = None,
    *,
    ids: Sequence[str] = (),
) -> np.ndarray:
    """`TextEncoder.encode` of texts that all processes have; each encodes a share of them.

    Args:
        encoder, params, texts, kind, progress: As for `TextEncoder.encode`.
        processes: Those that encode.
        directory: Where they hand each other their vectors.
        ids: What an error calls each text; (): its number alone.

    Returns:
        [len(texts), dim] float32, in every process.

    Raises:
        NotFiniteError: A vector is not finite, naming its text.
    """
    starts = _starts(len(texts), processes.count)
    share = slice(starts[processes.index], starts[processes.index + 1])
    own = texts[share]
    with _naming(ids[share]):
        vectors = encoder.encode(params, own, kind, progress)
    if processes.count == 1:
        return vectors
    paths = [directory / f"vectors.process-{i}.npy" for i in range(processes.count)]
    own_path = paths[processes.index]
    directory.mkdir(parents=True, exist_ok=True)
    np.save(own_path, vectors)
    processes.barrier()
    parts = [np.load(path, allow_pickle=False) for path in paths]
    processes.barrier()  # Nobody writes the next ones before all have read these.
    with contextlib.suppress(OSError):
        own_path.unlink()
    if progress is not None:
        progress(len(texts) - len(own))
    return np.concatenate([part for part in parts if len(part)] or [vectors])


@contextlib.contextmanager
def _naming(ids: Sequence[str], what: str = "") -> Iterator[None]:
    """Has an error of one of the texts say which one, where they have ids; `what` precedes it."""
    try:
        yield
    except NotFiniteError as error:
        if error.row is None or not ids:
            raise
        raise NotFiniteError(f"{what}{ids[error.row]}: {error}", row=error.row) from None


def _starts(count: int, shares: int) -> list[int]:
    """Where each share of so many items begins, and the last one ends."""
    return [count * share // shares for share in range(shares + 1)]
