"""The retrievers of a run, with what their workdir has of them."""

import functools
from collections.abc import Mapping
from typing import Any

from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever


def run_retriever(
    run: Run, models: RetrieverModel, texts: Mapping[str, str], params: Any, name: str
) -> CorpusRetriever:
    """A retriever of a run; vectors of the corpus, id -> text, go to work/vectors/NAME.npy."""
    return CorpusRetriever(
        models.encoder,
        params,
        texts,
        run.path("work", "vectors", f"{name}.npy"),
        dtype=run.config.retriever.vectors,
        search=run.config.search,
        processes=run.processes,
        reporter=run.reporter,
        shares=run.path("work", "shares"),
        timed=functools.partial(run.phase, f"encode the corpus, {name}"),
    )
