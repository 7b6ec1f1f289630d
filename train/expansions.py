"""Expansions of a run's queries, by the config's strategy, with passages of its own corpus."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.expand import Expander, make_expander
from expandr_jax.pair import Models, make_sampler
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import Corpus, encode_texts


def run_expander(
    run: Run, models: Models, data: TrainingData, retriever: Callable[[], tuple[Any, Corpus]]
) -> Expander:
    """Expands queries of a run; a strategy that searches by vectors does so under `retriever`."""

    def dense(queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        params, corpus = retriever()
        return corpus.index.search(encode_texts(run, models, params, queries, "query"), k)

    sampler = make_sampler(models, run.config, run.processes, run.reporter, run.path("work"))
    return make_expander(run.config, sampler, data.collection.corpus, dense)
