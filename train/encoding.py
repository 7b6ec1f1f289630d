"""Texts as vectors and the corpus with its index, as a run has them in its workdir."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.run import Run
from expandr_jax.vectors import corpus
from expandr_jax.vectors.corpus import Corpus
from expandr_jax.vectors.encoder import Kind

RunRetriever = Callable[[], tuple[Any, Corpus]]  # Its parameters, and the corpus as it encodes it.


def encode_texts(
    run: Run,
    models: RetrieverModel,
    params: Any,
    texts: Sequence[str],
    kind: Kind,
    progress: Callable[[int], None] | None = None,
    *,
    ids: Sequence[str] = (),
) -> np.ndarray:
    """`vectors.corpus.encode_texts` by the processes of a run."""
    shares = run.path("work", "shares")
    return corpus.encode_texts(
        models.encoder, params, texts, kind, run.processes, shares, progress, ids=ids
    )


def encode_corpus(
    run: Run, models: RetrieverModel, texts: Mapping[str, str], name: str, params: Any
) -> Corpus:
    """`vectors.corpus.encode_corpus` to work/vectors/NAME.npy, as a phase of the run."""
    with run.phase(f"encode the corpus, {name}"):
        return corpus.encode_corpus(
            models.encoder,
            params,
            texts,
            run.path("work", "vectors", f"{name}.npy"),
            dtype=run.config.retriever.vectors,
            search=run.config.search,
            processes=run.processes,
            reporter=run.reporter,
        )


def run_retriever(
    run: Run, models: RetrieverModel, texts: Mapping[str, str], name: str, params: Any
) -> RunRetriever:
    """A function that encodes the corpus and builds its index the first time it is called."""
    return functools.cache(lambda: (params, encode_corpus(run, models, texts, name, params)))
