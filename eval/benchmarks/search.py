"""Queries a second through an index, with what it finds, beside FAISS's on the same vectors.

The vectors are MiniLM's of the quick start's pydoc, and synthetic ones around random centres. All
sides take the 1,000 queries at once, on two threads. What a row says of each side: the share of the
exact best 10 and 100 that it finds (of documents that score the same, any will do), seconds to
build, and bytes a vector when it is saved.
"""

import functools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from eval.benchmarks import Comparison, Different, Running, minilm, per_second

QUERIES, DEPTH = 1000, 100
WIDTH, CENTRES, SPREAD = 128, 2000, 0.6  # The synthetic vectors'.
SETS = ("pydoc", "clustered 100,000", "clustered 500,000")
TIE = 1e-6  # Scores nearer than this are the same.
LEAST_RECALL = 0.9  # Share of the best 10 that an approximate index must find.
FAISS = ("faiss-cpu",)


def _synthetic(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around random centres, and queries drawn as they are."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((CENTRES, WIDTH), np.float32)

    def draw(rows: int) -> np.ndarray:
        noise = generator.standard_normal((rows, WIDTH), np.float32)
        vectors = centres[generator.integers(CENTRES, size=rows)] + SPREAD * noise
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    return draw(count), draw(QUERIES)


def _encoded(directory: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    minilm.write_pydoc(directory)
    queries, documents = minilm.read_pydoc(directory)
    encoder, params = minilm.encoder(48)  # As the quick start has it.
    return (
        encoder.encode(params, documents, "document"),
        encoder.encode(params, minilm.spread(queries, QUERIES), "query"),
    )


def _exact(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """[queries, DEPTH], the best scores, highest first."""
    best = []
    for start in range(0, len(queries), 100):
        scores = queries[start : start + 100] @ vectors.T
        best.append(-np.sort(np.partition(-scores, DEPTH, axis=1)[:, :DEPTH], axis=1))
    return np.concatenate(best)


def _recall(
    found: np.ndarray, vectors: np.ndarray, queries: np.ndarray, exact: np.ndarray
) -> np.ndarray:
    """The shares of the best 10 and 100 among the first so many that were found."""
    shares = []
    for k in (10, DEPTH):
        count = 0
        for row, query, scores in zip(found[:, :k], queries, exact, strict=True):
            count += (vectors[np.unique(row)] @ query >= scores[k - 1] - TIE).sum()
        shares.append(count / (k * len(found)))
    return np.array(shares)


def prepare(directory: pathlib.Path) -> None:
    """Writes vectors, queries and the exact best scores of each set."""
    for number, name in enumerate(SETS):
        if name == "pydoc":
            vectors, queries = _encoded(directory)
        else:
            vectors, queries = _synthetic(int(name.split()[1].replace(",", "")))
        np.save(directory / f"vectors-{number}.npy", vectors)
        np.save(directory / f"queries-{number}.npy", queries)
        np.save(directory / f"exact-{number}.npy", _exact(vectors, queries))


def _running(
    directory: pathlib.Path,
    number: int,
    build: Callable[[np.ndarray], Any],
    saved_bytes: Callable[[Any], int],
) -> Running:
    vectors, queries, exact = (
        np.load(directory / f"{kind}-{number}.npy", allow_pickle=False)
        for kind in ("vectors", "queries", "exact")
    )
    begin = time.perf_counter()
    index = build(vectors)
    seconds = time.perf_counter() - begin
    search = functools.partial(index.search, queries, DEPTH)  # Both give scores and rows.
    cost = np.array([seconds, saved_bytes(index) / len(vectors)])
    outputs = {"recall": _recall(search()[1], vectors, queries, exact), "cost": cost}
    return Running(per_second(len(queries), search), outputs)


def start_ours(directory: pathlib.Path, number: int, backend: str) -> Running:
    """`build_index` with its defaults for the size."""
    from expandr_jax.search import build_index

    def saved_bytes(index) -> int:
        target = directory / f"index-{number}-{backend}"
        index.save(target)
        return sum(file.stat().st_size for file in target.iterdir())

    return _running(directory, number, lambda x: build_index(x, backend), saved_bytes)


def start_faiss(directory: pathlib.Path, number: int, kind: str) -> Running:
    """FAISS's flat index, HNSW (32 links, efSearch 128) or IVF-PQ (4 dimensions a byte)."""
    import faiss

    def build(vectors: np.ndarray) -> faiss.Index:
        count, width = vectors.shape
        if kind == "flat":
            index = faiss.IndexFlatIP(width)
        elif kind == "HNSW":
            index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efSearch = 128
        else:
            lists = int(np.sqrt(count))
            index = faiss.index_factory(
                width, f"IVF{lists},PQ{width // 4}", faiss.METRIC_INNER_PRODUCT
            )
            index.nprobe = max(1, lists // 4)
            index.train(vectors[:100_000])
        index.add(vectors)
        return index

    return _running(directory, number, build, lambda index: len(faiss.serialize_index(index)))


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], least: float) -> str:
    """Says what each side finds and costs; ours must find enough."""
    if ours["recall"][0] < least:
        raise Different(f"recall@10 {ours['recall'][0]:.3f}, below {least}")
    said = []
    for name, side in (("ours", ours), ("theirs", theirs)):
        ten, hundred = side["recall"]
        seconds, size = side["cost"]
        said.append(
            f"{name}: recall@10 {ten:.3f}, recall@100 {hundred:.3f}, built in {seconds:.1f} s, "
            f"{size:.0f} bytes a vector"
        )
    return "; ".join(said)


ROWS = tuple(
    Comparison(
        name=f"search, {name}, {backend}",
        unit="queries/s",
        peer_name=f"FAISS {kind}",
        packages=FAISS,
        ours=functools.partial(start_ours, number=number, backend=backend),
        peer=functools.partial(start_faiss, number=number, kind=kind),
        check=functools.partial(check, least=1.0 if backend == "exact" else LEAST_RECALL),
    )
    for number, name in enumerate(SETS)
    for backend, kind in (("scann", "HNSW"), ("scann", "IVF-PQ"), ("exact", "flat"))
)
