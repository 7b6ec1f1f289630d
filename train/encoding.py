"""A retriever of a run: texts as vectors, and the corpus with its index, in the workdir."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import Corpus, encode_corpus, encode_texts
from expandr_jax.vectors.encoder import Kind


@dataclasses.dataclass(frozen=True)
class RunRetriever:
    """A retriever as a run has trained it, and a corpus as it encodes that.

    Attributes:
        run: Its processes encode together; its workdir has the vectors.
        models: The retriever's module.
        params: Its parameters.
        texts: The corpus, document id -> text.
        name: Vectors of the corpus are in work/vectors/NAME.npy.
    """

    run: Run
    models: RetrieverModel
    params: Any
    texts: Mapping[str, str]
    name: str

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The corpus, encoded and indexed as a phase of the run when it is first asked for."""
        run = self.run
        with run.phase(f"encode the corpus, {self.name}"):
            return encode_corpus(
                self.models.encoder,
                self.params,
                self.texts,
                run.path("work", "vectors", f"{self.name}.npy"),
                dtype=run.config.retriever.vectors,
                search=run.config.search,
                processes=run.processes,
                reporter=run.reporter,
            )

    def encode(
        self,
        texts: Sequence[str],
        kind: Kind,
        ids: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """`vectors.corpus.encode_texts` by the processes of the run."""
        run, encoder = self.run, self.models.encoder
        shares = run.path("work", "shares")
        return encode_texts(
            encoder, self.params, texts, kind, run.processes, shares, progress, ids=ids
        )

    def search(self, queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the corpus, [queries, k] each."""
        return self.corpus.index.search(self.encode(queries, "query"), k)
