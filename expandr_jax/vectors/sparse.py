"""Texts to sparse vectors, and a corpus that is searched by them."""

import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import scipy.sparse

from expandr_jax.files.records import hash_json
from expandr_jax.models.retriever import Kind
from expandr_jax.search import Index, SparseIndex, kept_index, text_fingerprint
from expandr_jax.sharding import make_mesh
from expandr_jax.vectors.encoder import Progress, TextEncoder
from expandr_jax.weights.sparse_encoder import load_sparse_encoder
from expandr_jax.weights.trees import hash_tree

SPARSE_TEXTS = 256  # Texts whose vectors, as wide as the vocabulary, are in memory at once.
Encode = Callable[[Sequence[str], Kind], np.ndarray]  # Texts to vectors [texts, dimension].


def sparse_vectors(
    encode: Encode, texts: Collection[str], kind: Kind, progress: Progress = lambda n: None
) -> Iterator[scipy.sparse.csr_array]:
    """Vectors of texts in their order, `SPARSE_TEXTS` rows at a time."""
    several: list[str] = []
    for number, text in enumerate(texts, start=1):
        several.append(text)
        if len(several) == SPARSE_TEXTS or number == len(texts):
            yield scipy.sparse.csr_array(encode(several, kind))
            progress(len(several))
            several = []


def build_sparse(encode: Encode, texts: Collection[str], dimension: int, key: str,
                 progress: Progress = lambda n: None) -> SparseIndex:  # fmt: skip
    """An index of documents, whose fingerprint is `key`."""
    return SparseIndex(sparse_vectors(encode, texts, "document", progress), dimension, key)


def search_texts(
    index: Index, encode: Encode, queries: Sequence[str], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the best documents for queries as texts, as `Index.search` has them."""
    found = [index.search(part, k) for part in sparse_vectors(encode, queries, "query")]
    if not found:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    scores, rows = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(rows)


class SparseCorpus:
    """A corpus searched for texts by the vectors of a sparse encoder, in one process.

    Args:
        source: The encoder's, as `load_sparse_encoder` has it.
        max_length: Most tokens of a text.
        texts: The documents.
        directory: Where the index is kept, and found again.
        progress: Called with the number of documents encoded since its last call.
    """

    def __init__(
        self,
        source: str,
        max_length: int,
        texts: Collection[str],
        directory: pathlib.Path,
        progress: Progress = lambda n: None,
    ):
        encoder, params, whose = _loaded(source, max_length)
        self._encode = functools.partial(encoder.encode, params)
        key = hash_json([whose, text_fingerprint(texts)])
        dimension = encoder.retriever.module.config.vocab_size
        self._index = kept_index(
            directory / f"splade.index-{key[:16]}",
            lambda: build_sparse(self._encode, texts, dimension, key, progress),
        )

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """`search_texts` of this corpus."""
        return search_texts(self._index, self._encode, queries, k)


@functools.lru_cache(maxsize=1)  # However many corpora are searched, one is in memory.
def _loaded(source: str, max_length: int) -> tuple[TextEncoder, Any, str]:
    """The encoder on this process's devices, its parameters, and a hash of both."""
    mesh = make_mesh(devices=jax.local_devices())
    retriever, params = load_sparse_encoder(source, max_length=max_length, mesh=mesh)
    encoder = TextEncoder(retriever, mesh)
    return encoder, params, hash_json([retriever.identity, hash_tree(params)])
