"""Vectors of a few texts at once, by programs that can all be compiled before the first request."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from expandr_jax.data.batches import bucket_length, encoding_lengths, pad
from expandr_jax.errors import NotFiniteError
from expandr_jax.models.retriever import Retriever
from expandr_jax.sharding import batch_divisor, make_mesh
from expandr_jax.vectors.encoder import Kind, embedder
from expandr_jax.weights.trees import model_shardings

BATCH_SIZES = (1, 4, 8, 16)  # Texts of a batch; those of a number between are filled up.
BETWEEN_TOKENS = 24  # Tokens, where encoding many has no length: most questions are about as long.
START_TOKENS = 48  # Tokens that a batch's start takes as long as.
LONG_TOKENS = 64  # Tokens; of longer texts there are fewer sizes of batches.
LONG_BATCH_SIZES = (1, 4)


class QueryEncoder:
    """Encodes with one retriever in a few shapes; one thread at a time tokenises.

    Other than `TextEncoder`'s, a vector may differ in its last bits with what is encoded beside it:
    that would have a single query wait for the rows of a whole batch.

    Args:
        retriever: Module, pooling and tokenizer.
        params: Its parameters.
        devices: Those that share the rows of a batch, if there are as many rows; None: all here.
    """

    def __init__(self, retriever: Retriever, params: Any, devices: Sequence[Any] | None = None):
        self.retriever = retriever
        devices = list(devices or jax.local_devices())
        self._meshes = [make_mesh(devices=devices[:1]), make_mesh(devices=devices)]
        if len(devices) == 1:
            self._meshes.pop()
        self._params = [
            jax.device_put(params, model_shardings(mesh, retriever.module, params))
            for mesh in self._meshes
        ]
        lengths = {
            *encoding_lengths(retriever.max_length),
            min(BETWEEN_TOKENS, retriever.max_length),
        }
        self._lengths = sorted(lengths)
        self._programs: dict[tuple[int, int], tuple[Callable[..., jax.Array], Any]] = {}
        self._tokenizing = threading.Lock()

    def compile(self, longest: int | None = None) -> None:
        """Makes the program of every shape of so many tokens at most.

        One that is not made yet is made when it is needed.
        """
        for length in self._lengths:
            if longest is None or length <= longest:
                for rows in _rows(length):
                    self._program(rows, length)

    def encode(self, texts: Sequence[str], kinds: Sequence[Kind]) -> np.ndarray:
        """Vectors [texts, dim] float32 of texts, each of its kind.

        Raises:
            NotFiniteError: A vector is not finite; its `row` is the text's.
        """
        running = [
            (places, self._start(tokens, length))
            for places, tokens, length in self._batches(self._tokens(texts, kinds))
        ]
        vectors = np.empty((0, 0), np.float32)
        for places, result in running:
            block = np.asarray(result)[: len(places)]
            if not vectors.size:
                vectors = np.empty((len(texts), block.shape[1]), np.float32)
            vectors[places] = block
        if not np.isfinite(vectors).all():
            row = int(np.argmin(np.isfinite(vectors).all(1)))
            raise NotFiniteError("a text's vector is not finite: the weights are damaged", row=row)
        return vectors

    def _tokens(self, texts: Sequence[str], kinds: Sequence[Kind]) -> list[list[int]]:
        tokens: dict[int, list[int]] = {}
        with self._tokenizing:  # The library's tokenizers are for one thread.
            for kind in dict.fromkeys(kinds):
                places = [i for i, own in enumerate(kinds) if own == kind]
                ids = self.retriever.token_ids([texts[i] for i in places], kind)
                tokens |= zip(places, ids, strict=True)
        return [tokens[i] for i in range(len(texts))]

    def _batches(
        self, tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], list[Sequence[int]], int]]:
        """Which texts each batch has, their ids and its length."""
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        lengths = [bucket_length(len(tokens[i]), self._lengths) for i in order]
        for start, end in split(lengths):
            places = order[start:end]
            yield places, [tokens[i] for i in places], lengths[end - 1]

    def _start(self, tokens: list[Sequence[int]], length: int) -> jax.Array:
        rows = bucket_length(len(tokens), _rows(length))
        program, params = self._program(rows, length)
        filled = tokens + tokens[:1] * (rows - len(tokens))
        return program(params, *pad(filled, self.retriever.tokenizer.pad_token_id, length))

    def _program(self, rows: int, length: int) -> tuple[Callable[..., jax.Array], Any]:
        """The program of a shape, and where its parameters are."""
        if (rows, length) not in self._programs:
            which = len(self._meshes) - 1 if rows % batch_divisor(self._meshes[-1]) == 0 else 0
            mesh, params = self._meshes[which], self._params[which]
            lowered = embedder(mesh, self.retriever).lower(params, *pad([[1]] * rows, 0, length))
            self._programs[rows, length] = lowered.compile(), params
        return self._programs[rows, length]


def split(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """From where to where batches go that have the least to compute.

    A batch is as long as its last text, and filled up to the next number of rows.

    Args:
        lengths: The texts' lengths, in rising order.
    """
    best = [(0, 0)]  # Tokens of all batches up to each text, and where the last of them begins.
    for end in range(1, len(lengths) + 1):
        rows = _rows(lengths[end - 1])
        starts = range(max(0, end - rows[-1]), end)
        costs = [
            best[i][0] + bucket_length(end - i, rows) * lengths[end - 1] + START_TOKENS
            for i in starts
        ]
        least = min(range(len(costs)), key=costs.__getitem__)
        best.append((costs[least], starts[least]))
    parts, end = [], len(lengths)
    while end:
        parts.append((best[end][1], end))
        end = best[end][1]
    return parts[::-1]


def _rows(length: int) -> Sequence[int]:
    return BATCH_SIZES if length <= LONG_TOKENS else LONG_BATCH_SIZES
