"""A corpus as one retriever encodes it, with its index."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from expandr_jax.search import Index, build_index
from expandr_jax.stored_vectors import StoredVectors
from expandr_jax.vector_file import encode_to_file
from train.models import Models
from train.run import Run


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The corpus as the current retriever sees it.

    Attributes:
        ids: Document ids, in the order of the index.
        vectors: [documents, dim], float32 when indexed or stored in less.
        index: Search over the vectors.
    """

    ids: list[str]
    vectors: np.ndarray | StoredVectors
    index: Index


def encode_corpus(
    run: Run, models: Models, texts: Mapping[str, str], name: str, params: Any
) -> Corpus:
    """Encodes documents (id -> text) to work/vectors/NAME.npy and builds their index."""
    path = run.path("work", "vectors", f"{name}.npy")
    with run.progress(f"{name}: documents encoded", len(texts)) as advance:
        vectors = encode_to_file(
            path,
            models.encoder,
            params,
            texts.values(),
            "document",
            dtype=run.config.retriever.vectors,
            progress=advance,
        )
    return Corpus(list(texts), vectors, build_index(vectors, **run.config.search))
