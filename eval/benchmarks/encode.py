"""Documents a second through MiniLM: 2,000 of pydoc, cut at 128 and at 256 tokens, in float32.

Text goes in and vectors come out, so tokenising, sorting, padding and checks are part of it on both
sides. sentence-transformers takes the quickest of three batch sizes, 32 being its default.
"""

import functools
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from eval.benchmarks import Comparison, Different, Running, minilm, per_second

DOCUMENTS = 2000
TRIED = 256  # Documents of the trial that chooses the peer's batch.
LEAST_COSINE = 0.9999


def prepare(directory: pathlib.Path) -> None:
    """Writes the documents and how many tokens each has."""
    minilm.write_pydoc(directory)
    documents = minilm.spread(minilm.read_pydoc(directory)[1], DOCUMENTS)
    retriever, _ = minilm.load(max(LENGTHS))
    lengths = [len(ids) for ids in retriever.token_ids(documents)]
    (directory / "documents.json").write_text(json.dumps([documents, lengths]))


def _documents(directory: pathlib.Path) -> tuple[list[str], list[int]]:
    documents, lengths = json.loads((directory / "documents.json").read_text())
    return documents, lengths


def start_ours(directory: pathlib.Path, length: int) -> Running:
    """`TextEncoder` on the mesh that a run has by default."""
    import jax

    documents, _ = _documents(directory)
    encoder, params = minilm.encoder(length)
    encode = functools.partial(encoder.encode, params, documents, "document")
    outputs = {"vectors": encode()}
    setting = f"batches of {encoder.tokens_per_batch} tokens over {jax.device_count()} devices"
    return Running(per_second(DOCUMENTS, encode), outputs, setting)


def start_peer(directory: pathlib.Path, length: int) -> Running:
    """`SentenceTransformer.encode`."""
    from sentence_transformers import SentenceTransformer

    documents, _ = _documents(directory)
    model = SentenceTransformer(minilm.path(), device="cpu")
    model.max_seq_length = length
    encode = functools.partial(model.encode, show_progress_bar=False)

    def rate(batch: int, texts: list[str]) -> float:
        return per_second(len(texts), lambda: encode(texts, batch_size=batch))()

    tried = minilm.spread(documents, TRIED)
    rate(32, tried)
    batch = max((16, 32, 64), key=lambda size: rate(size, tried))
    outputs = {"vectors": encode(documents, batch_size=batch)}
    return Running(lambda: rate(batch, documents), outputs, f"batches of {batch}")


def check(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> str:
    """The two vectors of every document have the same direction, and length one."""
    a, b = ours["vectors"], theirs["vectors"]
    if a.shape != b.shape:
        raise Different(f"vectors: shapes {a.shape} and {b.shape}")
    cosines = np.sum(a * b, axis=1, dtype=np.float64)
    lengths = np.linalg.norm(a, axis=1)
    if not (cosines.min() >= LEAST_COSINE and np.abs(lengths - 1).max() < 1e-4):
        raise Different(f"least cosine {cosines.min():.6f}, lengths up to {lengths.max():.6f}")
    return f"cosines at least {cosines.min():.6f}"


def flops(directory: pathlib.Path, length: int) -> float:
    """Operations of a document on average, padding left out."""
    _, lengths = _documents(directory)
    return minilm.forward_flops([min(n, length) for n in lengths]) / DOCUMENTS


LENGTHS = (128, 256)
ROWS = tuple(
    Comparison(
        name=f"encode, {length} tokens",
        unit="documents/s",
        peer_name="sentence-transformers",
        packages=("sentence-transformers", *minilm.PACKAGES),
        ours=functools.partial(start_ours, length=length),
        peer=functools.partial(start_peer, length=length),
        check=check,
        flops=functools.partial(flops, length=length),
    )
    for length in LENGTHS
)
