"""Before step B: the generator learns to write what relevant documents begin with, if asked to."""

import dataclasses
from typing import Any

from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.expand import Expander, journaled
from expandr_jax.objectives.warm_start import WARM_START
from expandr_jax.pair import GeneratorModel
from expandr_jax.runtime.run import Run
from train.generator import train_generator


def warm_start(
    run: Run, models: GeneratorModel, expander: Expander, data: TrainingData
) -> Any | None:
    """The adapter that training begins with, as `warm_start` has it; None for a new one.

    One pass over the queries of step B, by the likelihood of their relevant document's first
    `expansion.max_new_tokens` tokens; the rest is as section dpo says. Checkpoints go to
    checkpoints/warm-start.
    """
    if not run.config.warm_start:
        return None
    with run.phase("warm start"):
        queries = {query: data.collection.queries[query] for query in data.generator_train}
        path = run.path("work", "warm-start.jsonl")
        messages = expander.messages(queries, journaled(expander, None, path, "before warm start"))
        corpus, chat_text = data.collection.corpus, models.generator.chat_text
        rows = [
            {
                "query_id": query,
                "prompt": chat_text(messages[query]),
                "response": corpus[data.positive(query)],
            }
            for query in queries
        ]
        most = run.config.expansion.max_new_tokens
        settings = dataclasses.replace(
            run.config.dpo, epochs=1.0, dev_share=0.0, response_length=most
        )
        return train_generator(
            run, models, None, rows, round_=0, name="warm-start", objective=WARM_START,
            settings=settings,
        )  # fmt: skip
