"""Exact search by several processes beside one: what they find, and what each of them holds.

    python -m tests.divided_search 8000000 4

makes so many random vectors of 64 numbers in a temporary directory, half of them twice, searches
them by one process and by four, and prints the most memory of each above that of the same program
at 20,000 vectors, beside the bytes of its part. It exits 1 where the results differ.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from tests.commands import ROOT, free_port

WIDTH, QUERIES, DEPTH, SMALL = 64, 64, 100, 20_000


def write_vectors(path: pathlib.Path, rows: int) -> None:
    """A .npy of random vectors; the second half is the first."""
    file = np.lib.format.open_memmap(path, "w+", np.float32, (rows, WIDTH))
    half, draw = rows // 2, np.random.default_rng(0)
    for start in range(0, half, 1 << 16):
        end = min(start + (1 << 16), half)
        file[start:end] = file[half + start : half + end] = draw.normal(size=(end - start, WIDTH))
    file.flush()


def peaks(directory: pathlib.Path, rows: int, count: int) -> tuple[list[int], list[int]]:
    """The most bytes and the rows of each of so many processes; what they find goes to a file."""
    port = str(free_port())
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.divided_search", "child", str(directory), str(rows),
             str(count), str(index), port],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )
        for index in range(count)
    ]  # fmt: skip
    printed = [child.communicate(timeout=550)[0] for child in children]
    assert not any(child.returncode for child in children), printed
    found = [json.loads(text.splitlines()[-1]) for text in printed]
    return [each["peak"] for each in found], [each["rows"] for each in found]


def search_as_one(directory: pathlib.Path, rows: int, count: int, index: int, port: str) -> None:
    """One of the processes."""
    from configs import base
    from expandr_jax.config import read_config
    from expandr_jax.runtime import processes
    from expandr_jax.vectors.corpus import Corpus
    from expandr_jax.vectors.stored import open_vectors

    processes.start(f"127.0.0.1:{port}", count, index)
    own, path = processes.current(), directory / f"{rows}.npy"
    config = base.get_config()
    config.search.backend = "exact"
    config.search.exact.block_rows = 1024  # So that each process has some of SMALL, too.
    corpus = Corpus(
        range(rows), None, read_config(config).search, path, processes=own,
        shares=directory / "shares",
    )  # fmt: skip
    divided = corpus.index
    if own.is_main:
        queries = np.random.default_rng(1).normal(size=(QUERIES, WIDTH)).astype(np.float32)
        queries[: QUERIES // 2] = open_vectors(path)[: QUERIES // 2]
        scores, found = divided.search(queries, DEPTH)
        np.savez(directory / f"{rows}-{count}.npz", scores=scores, rows=found)
    own.finish()
    status = pathlib.Path("/proc/self/status").read_text()
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    part = sum(end - start for start, end in divided.spans) if count > 1 else rows
    print(json.dumps({"peak": peak, "rows": part}))


def measure(rows: int, count: int) -> list[tuple[int, int]]:
    """Each process's peak above that at SMALL vectors, and its part, in bytes.

    Raises:
        AssertionError: One process finds something else.
    """
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        for size in (SMALL, rows):
            write_vectors(directory / f"{size}.npy", size)
        small, _ = peaks(directory, SMALL, count)
        large, parts = peaks(directory, rows, count)
        peaks(directory, rows, 1)
        ours, theirs = (np.load(directory / f"{rows}-{n}.npz") for n in (count, 1))
        for field in ("scores", "rows"):
            np.testing.assert_array_equal(ours[field], theirs[field])
    assert sum(parts) == rows
    bytes_of = [4 * WIDTH * part for part in parts]
    pairs = zip(large, small, bytes_of, strict=True)
    print(*(f"process {i}: {(a - b) / 1e6:.0f} MB above the start, its part {c / 1e6:.0f} MB"
            for i, (a, b, c) in enumerate(pairs)), sep="\n")  # fmt: skip
    return [(a - b, c) for a, b, c in zip(large, small, bytes_of, strict=True)]


if __name__ == "__main__":
    if sys.argv[1] == "child":
        search_as_one(pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:6]), sys.argv[6])
    else:
        measure(*map(int, sys.argv[1:3]))
