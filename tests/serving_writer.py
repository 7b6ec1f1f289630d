"""A program that writes documents until it is killed, and says each write that is acknowledged.

Batches of three documents each have one text, so that half a batch would be seen.
"""

import hashlib
import pathlib
import random
import sys
from collections.abc import Sequence

import numpy as np

from expandr_jax.serving.documents import LiveDocuments
from expandr_jax.serving.snapshots import Base

WIDTH = 16
BASE = {"base": "text"}


def encode(texts: Sequence[str]) -> np.ndarray:
    """Vectors that depend on each text alone."""
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    rows = [np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds]
    return np.asarray(rows, np.float32).reshape(-1, WIDTH)


def open_state(state: pathlib.Path, merge_from: int = 30) -> LiveDocuments:
    """The documents that the program writes to."""
    base = Base.of(BASE, encode(list(BASE.values())))
    return LiveDocuments(state, "key", base, encode, merge_from=merge_from)


def main(state: str, seed: str) -> None:
    """Writes; says "BATCH:NUMBER TEXT" of each document, with "-" for one that is removed."""
    import pyarrow  # noqa: F401  Merges need it; within a quarter of a second none would end else.

    documents, drawn = open_state(pathlib.Path(state)), random.Random(int(seed))
    print("begins", flush=True)
    while True:
        batch, text = f"b{drawn.randrange(20)}", f"t{drawn.randrange(10**9)}"
        names = [f"{batch}:{number}" for number in range(3)]
        if drawn.random() < 0.3:
            documents.remove(names)
            text = "-"
        else:
            documents.put([(name, text) for name in names])
        print("".join(f"{name} {text}\n" for name in names), end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
