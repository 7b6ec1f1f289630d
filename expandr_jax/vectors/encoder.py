"""Texts to vectors: tokenised a block ahead, batched by length, a few compiled shapes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from expandr_jax.data.batches import bucket_length, encoding_lengths, pad
from expandr_jax.errors import NotFiniteError
from expandr_jax.models.retriever import Kind, Retriever
from expandr_jax.sharding import batch_divisor, batch_sharding, on_mesh
from expandr_jax.weights.trees import model_shardings

TEXTS_AT_ONCE = 16384  # Texts whose token ids, many times as large as they, are in memory at once.
TOKENS_PER_BATCH = 2048  # Rows times length of a batch, where nothing else is said.

Progress = Callable[[float], None]
Cut = Callable[[Sequence[bool]], None]


def embedder(mesh: Mesh, retriever: Retriever) -> Callable[..., jax.Array]:
    """(params, ids, mask) -> vectors [rows, width], rows spread over the mesh."""
    rows = batch_sharding(mesh)
    return jax.jit(on_mesh(mesh, retriever.embed), in_shardings=(None, rows, rows))


class TextEncoder:
    """Encodes texts with one retriever; parameters are passed to each call, so training can go on.

    A text's vector depends on the text alone: it always runs at the length of its own bucket and in
    the same batch shape, whatever else is encoded with it.

    Args:
        retriever: Module, pooling and tokenizer.
        mesh: Rows are spread over its data-parallel devices.
        tokens_per_batch: Rows times length of one batch over all devices. More than 1,024 a device
            are slower on CPU, where a layer's results no longer stay in the caches.
    """

    def __init__(
        self, retriever: Retriever, mesh: Mesh, *, tokens_per_batch: int = TOKENS_PER_BATCH
    ):
        self.retriever = retriever
        self.mesh = mesh
        self.tokens_per_batch = tokens_per_batch
        self._embed = embedder(mesh, retriever)

    def prompt(self, kind: Kind) -> str:
        """What the retriever has put before each text of a kind."""
        return self.retriever.prompt(kind)

    def tokenize(self, texts: Sequence[str], kind: Kind, cut: Cut | None = None) -> list[list[int]]:
        """Token ids of texts with their kind's prompt, cut as it is; see `Retriever.token_ids`."""
        return self.retriever.token_ids(texts, kind, cut)

    def encode(
        self,
        params: Any,
        texts: Sequence[str],
        kind: Kind,
        progress: Progress | None = None,
        cut: Cut | None = None,
    ) -> np.ndarray:
        """Vectors of texts.

        Args:
            params: The retriever's parameters.
            texts: Any number of texts; beside their vectors, a block of them takes memory.
            kind: Decides the prompt that is put before each text.
            progress: Called with the number of texts done since its last call.
            cut: Called with whether each text, some at a time, is longer than the retriever reads.

        Returns:
            [len(texts), dim] float32.

        Raises:
            NotFiniteError: If a vector is not finite, which means damaged or diverged weights; its
                `row` is the text's.
        """
        # A training step may have spread them over more devices.
        params = jax.device_put(params, model_shardings(self.mesh, self.retriever.module, params))
        rows = batch_sharding(self.mesh)
        running = (
            # Where there are several processes, none may hand a program arrays of its host.
            ([first + i for i in indices], self._embed(params, *jax.device_put((ids, mask), rows)))
            for first in range(0, len(texts), TEXTS_AT_ONCE)
            for indices, ids, mask in self._batches(
                self.retriever.token_ids(texts[first : first + TEXTS_AT_ONCE], kind, cut)
            )
        )
        vectors = np.zeros((0, 0), np.float32)
        ahead = next(running, None)
        while ahead is not None:
            # One batch is in flight while the next is prepared.
            (indices, result), ahead = ahead, next(running, None)
            block = np.asarray(result)[: len(indices)]
            if vectors.shape[0] == 0:
                vectors = np.zeros((len(texts), block.shape[1]), np.float32)
            if not np.isfinite(block).all():
                bad = indices[int(np.argmin(np.isfinite(block).all(1)))]
                raise NotFiniteError(
                    f"text {bad} ({texts[bad][:60]!r}): its vector is not finite; the "
                    "retriever's weights are damaged or training diverged",
                    row=bad,
                )
            vectors[indices] = block
            if progress is not None:
                progress(len(indices))
        return vectors

    def _batches(
        self, tokens: Sequence[Sequence[int]]
    ) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Which texts each batch has, the shortest first, and their ids and mask [rows, length]."""
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        lengths, divisor = encoding_lengths(self.retriever.max_length), batch_divisor(self.mesh)
        start = 0
        while start < len(order):
            length = bucket_length(len(tokens[order[start]]), lengths)
            rows = max(1, self.tokens_per_batch // length // divisor) * divisor
            indices = [i for i in order[start : start + rows] if len(tokens[i]) <= length]
            # Rows that only fill the shape repeat the first: no row is ever fully masked.
            filled = [tokens[i] for i in indices + indices[:1] * (rows - len(indices))]
            yield indices, *pad(filled, self.retriever.tokenizer.pad_token_id, length)
            start += len(indices)
