"""What a run searches: its retrievers and BM25, with what the workdir has of them."""

import functools
from collections.abc import Mapping
from typing import Any

from expandr_jax.pair import RetrieverModel
from expandr_jax.runtime.run import Run
from expandr_jax.search import kept_bm25
from expandr_jax.search.divided import DividedWords
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
        normalize=models.normalize,
        timed=functools.partial(run.phase, f"encode the corpus, {name}"),
    )


def run_words(run: Run, texts: Mapping[str, str], folder: str = "") -> DividedWords:
    """Gives BM25's index of a corpus, id -> text, opened or made when it is first called.

    It is kept under work/, and there in `folder`: "tests/NAME" for a further collection. All
    processes call this; process 0 alone searches, and the others for their share of its queries.
    """
    main, where = run.processes.is_main, run.path("work", folder)
    return DividedWords(
        folder,
        lambda: kept_bm25(where, texts.values(), write=main, reporter=run.reporter),
        run.processes,
        run.path("work", "shares"),
    )
