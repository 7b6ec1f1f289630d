"""A corpus as a file of vectors: encoded as it streams by, and continued after a kill."""

import io
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from expandr_jax.checkpoint import hash_tree
from expandr_jax.data.records import Journal, hash_json
from expandr_jax.encoding import Kind, TextEncoder
from expandr_jax.errors import UserError
from expandr_jax.stored_vectors import (
    DTYPES,
    StoredVectors,
    from_storage,
    open_vectors,
    storage_type,
    to_storage,
)


def encode_to_file(
    path: str | os.PathLike,
    encoder: TextEncoder,
    params: Any,
    texts: Iterable[str],
    kind: Kind,
    *,
    dtype: str = "float32",
    block: int = 16384,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray | StoredVectors:
    """Encodes a stream of texts to a .npy file, with one block of texts in memory at a time.

    The same call goes on, after a kill, with the block it was at. PATH.jsonl has a line for each
    block, with hashes of what its vectors are of. A file that is finished is opened without
    reading the texts.

    Args:
        path: The file; it appears whole.
        encoder: Turns texts into vectors.
        params: The retriever's parameters.
        texts: The same ones in the same order when it is called again.
        kind: Decides the prompt that is put before each text.
        dtype: "float32"; "float16" or "bfloat16": half the space, and components right to three
            or two digits; "int8": a quarter, with a scale for each vector. An index reads each as
            float32.
        block: Texts between two writes; they are sorted by length within a block.
        progress: Called with the number of texts done since its last call.

    Returns:
        [texts, dim], memory-mapped; see `stored_vectors`.

    Raises:
        UserError: The file cannot be written or is damaged, or was begun with other weights, texts
            or settings; there are no texts; or a vector is not finite.
    """
    if dtype not in DTYPES:
        raise UserError(f"{path}: vectors of type {dtype!r}; expected {', '.join(DTYPES)}")
    path = pathlib.Path(path)
    journal = Journal(f"{path}.jsonl")
    retriever = encoder.retriever
    prompt = retriever.query_prompt if kind == "query" else retriever.document_prompt
    settings = [prompt, retriever.pooling, retriever.normalize, retriever.max_length, dtype, block]
    identity = hash_json([hash_tree(params), *settings])
    if any(row["identity"] != identity for row in journal.rows):
        raise UserError(f"{path}: holds vectors of other weights or settings; remove {path}*")
    if path.exists() != journal.finished and not (path.exists() and journal.rows):
        raise UserError(f"{path}: it and {journal.path.name} do not fit together; remove {path}*")
    if not path.exists():
        part = path.with_name(f"{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "r+b" if journal.rows else "w+b") as file:
                for first, chunk, digest in _missing_blocks(path, texts, block, journal, progress):
                    try:
                        vectors = encoder.encode(params, chunk, kind, progress)
                    except UserError as error:
                        raise UserError(f"{path}, texts from {first}: {error}") from None
                    _append(file, journal, vectors, dtype)
                    row = {"rows": len(chunk), "width": vectors.shape[1]}
                    journal.append([{"identity": identity, "texts": digest, **row}])
                _write_header(file, journal, dtype)
            part.replace(path)
        except OSError as error:
            raise UserError(f"{part}: cannot be written: {error.strerror}") from error
    if not journal.finished:
        journal.finish()
    return open_vectors(path)


def _missing_blocks(path, texts, size, journal, progress):
    """Yields (number of the first text, texts, their hash) of each block not written before."""
    stream, first, done = iter(texts), 0, list(journal.rows)
    for number in itertools.count():
        chunk = list(itertools.islice(stream, size))
        if not chunk:
            break
        digest = hash_json(chunk)
        if number >= len(done):
            yield first, chunk, digest
        elif done[number]["texts"] != digest:
            raise UserError(
                f"{path}: the texts from {first} are others than before; remove {path}*"
            )
        elif progress is not None:
            progress(len(chunk))
        first += len(chunk)
    if number < len(done):
        raise UserError(f"{path}: there are fewer texts than before; remove {path}*")
    if not first:
        raise UserError(f"{path}: no texts to encode; expected at least one")


def _append(file: BinaryIO, journal: Journal, vectors: np.ndarray, dtype: str) -> None:
    """Writes vectors behind those of the journal's rows, over what a kill left there."""
    with np.errstate(over="ignore"):
        stored = to_storage(vectors, dtype)
    if not np.isfinite(from_storage(stored)[:]).all():
        raise UserError(f"{journal.path}: a vector is too long for {dtype}; use float32")
    rows = sum(row["rows"] for row in journal.rows)
    header = _header(dtype, 0, vectors.shape[1])
    end = len(header) + rows * stored[:1].nbytes
    if rows == 0:
        file.write(header)
    if os.fstat(file.fileno()).st_size < end and rows:
        raise UserError(f"{file.name}: is shorter than {journal.path.name} says; remove both")
    file.seek(end)
    file.truncate()
    file.write(np.ascontiguousarray(stored).data.cast("B"))
    file.flush()
    os.fsync(file.fileno())


def _write_header(file: BinaryIO, journal: Journal, dtype: str) -> None:
    rows = sum(row["rows"] for row in journal.rows)
    header = _header(dtype, rows, journal.rows[0]["width"])
    file.seek(0)
    file.write(header)
    file.flush()
    os.fsync(file.fileno())


def _header(dtype: str, rows: int, width: int) -> bytes:
    """A .npy header; its length does not depend on the number of rows."""
    kind, row = storage_type(dtype, width)
    buffer = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False,
             "shape": (rows, *row)}  # fmt: skip
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()
