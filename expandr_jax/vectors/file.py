"""A corpus as a file of vectors: encoded as it streams by, and continued after a kill."""

import hashlib
import io
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np

from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.files.records import Journal, hash_json, read_jsonl
from expandr_jax.vectors.encoder import Kind, TextEncoder
from expandr_jax.vectors.stored import (
    VECTOR_DTYPES,
    StoredVectors,
    from_storage,
    open_vectors,
    storage_type,
    to_storage,
)
from expandr_jax.weights.trees import hash_tree

logger = logging.getLogger(__name__)


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
    vectors: Callable[[int, int], np.ndarray] | None = None,
) -> np.ndarray | StoredVectors:
    """Encodes a stream of texts to a .npy file, with one block of texts in memory at a time.

    The same call goes on, after a kill, with the block it was at. PATH.jsonl has a line for each
    block, with hashes of its vectors and of what they are of, and how many texts were cut. A file
    that is finished is opened without reading the texts; from the first block that is damaged, it
    is made again.

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
        vectors: What the encoder makes of the texts from one number to another, where that is
            known, as from files that several processes made; it is then not run.

    Returns:
        [texts, dim], memory-mapped; see `stored`.

    Raises:
        UserError: The file cannot be written, or was begun with other weights, texts or settings;
            there are no texts; or a vector is not finite (NotFiniteError; its `row` is the text's).
    """
    if dtype not in VECTOR_DTYPES:
        raise UserError(f"{path}: vectors of type {dtype!r}; expected {', '.join(VECTOR_DTYPES)}")
    path = pathlib.Path(path)
    journal = Journal(f"{path}.jsonl")
    retriever, of = encoder.retriever, [hash_tree(params), encoder.prompt(kind)]
    identity = hash_json([*of, retriever.identity, dtype, block])
    # What older versions told apart; the files of a run are its own, whose models are the same.
    older = retriever.pooling, retriever.normalize, retriever.max_length, dtype, block
    known = identity, hash_json([*of, *older])
    if any(row["identity"] not in known for row in journal.rows):
        raise UserError(f"{path}: holds vectors of other weights or settings; remove {path}*")
    part = path.with_name(f"{path.name}.part")
    try:
        good = _intact_blocks(path if path.exists() else part, journal, dtype)
        if good < len(journal.rows):
            logger.warning("%s: is damaged; vectors from block %d are made again", path, good)
            journal.keep(good)
        if not (path.exists() and journal.rows and _is_whole(path, journal, dtype)):
            if path.exists():
                path.replace(part)

            def encode(first: int, chunk: list[str]) -> tuple[np.ndarray, dict[str, int]]:
                if vectors is not None:
                    return vectors(first, first + len(chunk)), {}
                cut: list[bool] = []
                made = encoder.encode(params, chunk, kind, progress, cut.extend)
                return made, {"cut": sum(cut)}

            _write_missing(part, encode, texts, dtype, block, journal, identity, progress)
            part.replace(path)
    except OSError as error:
        raise UserError(f"{part}: cannot be written: {error.strerror}") from error
    if not journal.finished:
        journal.finish()
    return open_vectors(path)


def check_whole(path: str | os.PathLike) -> None:
    """Refuses a finished file of vectors as float32 that is not as it was written.

    Raises:
        UserError: It, or the file beside it that says what it has, is damaged or missing.
    """
    path, journal = pathlib.Path(path), Journal(f"{path}.jsonl")
    if not journal.finished:
        damage = journal.damage or f"{journal.path}: is missing"
    elif not path.exists() or not _is_whole(path, journal, "float32"):
        damage = f"{path}: is missing or was cut"
    elif _intact_blocks(path, journal, "float32") < len(journal.rows):
        damage = f"{path}: is damaged"
    else:
        return
    raise UserError(f"{damage}; the same command makes again what it lacks")


def content_key(path: str | os.PathLike) -> str:
    """The identity of a finished file of vectors, found without reading its vectors."""
    rows = read_jsonl(f"{path}.jsonl", {"sha256": str})
    return hash_json([row["sha256"] for _, row in rows])


def count_cut(path: str | os.PathLike) -> int:
    """How many of a file's texts are longer than its retriever reads; 0 where that is not told.

    It is not of blocks that an older version wrote, or that were put together of others' files.
    """
    told = [row.get("cut") for row in Journal(f"{path}.jsonl").rows]
    return 0 if None in told else sum(told)


def _intact_blocks(path: pathlib.Path, journal: Journal, dtype: str) -> int:
    """How many of the journal's first blocks the file holds as they were written.

    All of it is read, once a start, before a stage searches it: a damaged vector changes rankings
    without a word, and neither its size nor its time need tell.
    """
    if not journal.rows or not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(len(npy_header(dtype, 0, journal.rows[0]["width"])))
        for number, row in enumerate(journal.rows):
            size = row["rows"] * np.dtype(storage_type(dtype, row["width"])).itemsize
            if hashlib.sha256(file.read(size)).hexdigest() != row["sha256"]:
                return number
    return len(journal.rows)


def _is_whole(path: pathlib.Path, journal: Journal, dtype: str) -> bool:
    """Whether the file's header is that of the journal's blocks and nothing follows them."""
    rows, width = sum(row["rows"] for row in journal.rows), journal.rows[0]["width"]
    header = npy_header(dtype, rows, width)
    size = len(header) + rows * np.dtype(storage_type(dtype, width)).itemsize
    with open(path, "rb") as file:
        return file.read(len(header)) == header and path.stat().st_size == size


def _write_missing(part, encode, texts, dtype, block, journal, identity, progress):
    """Encodes the blocks that the journal lacks, into the file that is not finished."""
    part.parent.mkdir(parents=True, exist_ok=True)
    if journal.finished:
        journal.keep(len(journal.rows))
    with open(part, "r+b" if journal.rows else "w+b") as file:
        for first, chunk, digest in _missing_blocks(part, texts, block, journal, progress):
            try:
                vectors, counted = encode(first, chunk)
            except NotFiniteError as error:
                row = None if error.row is None else first + error.row
                raise NotFiniteError(f"{part}, texts from {first}: {error}", row=row) from None
            sha256 = _append(file, journal, vectors, dtype)
            row = {"rows": len(chunk), "width": vectors.shape[1], "sha256": sha256, **counted}
            journal.append([{"identity": identity, "texts": digest, **row}])
        file.seek(0)
        rows = sum(row["rows"] for row in journal.rows)
        file.write(npy_header(dtype, rows, journal.rows[0]["width"]))
        file.flush()
        os.fsync(file.fileno())


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


def _append(file: BinaryIO, journal: Journal, vectors: np.ndarray, dtype: str) -> str:
    """Writes vectors behind those of the journal's rows, over what a kill left; their sha256."""
    with np.errstate(over="ignore"):
        stored = to_storage(vectors, dtype)
    if not np.isfinite(from_storage(stored)[:]).all():
        raise UserError(f"{journal.path}: a vector is too long for {dtype}; use float32")
    rows = sum(row["rows"] for row in journal.rows)
    header = npy_header(dtype, 0, vectors.shape[1])
    end = len(header) + rows * stored[:1].nbytes
    if rows == 0:
        file.write(header)
    file.seek(end)
    file.truncate()
    data = np.ascontiguousarray(stored).data.cast("B")
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def npy_header(dtype: str, rows: int, width: int) -> bytes:
    """A .npy header; its length does not depend on the number of rows."""
    kind, row = storage_type(dtype, width)
    buffer = io.BytesIO()
    shape = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False,
             "shape": (rows, *row)}  # fmt: skip
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()
