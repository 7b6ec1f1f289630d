"""Vectors of a few texts at once, by programs that can all be compiled before the first request."""

import itertools
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

ROWS = (1, 4, 8, 16)  # Texts of a batch; those of a number between are filled up.
BETWEEN = 24  # Tokens, where encoding many has no length: most questions are about as long.
LONG = 64  # Tokens; of longer texts there are fewer sizes of batches.
LONG_ROWS = (1, 4)


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
        lengths = {*encoding_lengths(retriever.max_length), min(BETWEEN, retriever.max_length)}
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
        lengths = [bucket_length(len(ids), self._lengths) for ids in tokens]
        order = sorted(range(len(tokens)), key=lengths.__getitem__)
        for length, same in itertools.groupby(order, key=lengths.__getitem__):
            places = list(same)
            most = _rows(length)[-1]
            for start in range(0, len(places), most):
                some = places[start : start + most]
                yield some, [tokens[i] for i in some], length

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


def _rows(length: int) -> Sequence[int]:
    return ROWS if length <= LONG else LONG_ROWS
