"""Before step B: the generator learns to write what relevant documents begin with, if asked to."""

import dataclasses
from collections.abc import Callable, Mapping
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

    One pass over the queries of step B with each of their relevant documents, by the likelihood of
    its first `expansion.max_new_tokens` tokens; the rest is as section dpo says. Checkpoints go to
    checkpoints/warm-start.
    """
    if not run.config.warm_start:
        return None
    with run.phase("warm start"):
        queries = {query: data.collection.queries[query] for query in data.generator_train}
        path = run.path("work", "warm-start.jsonl")
        messages = expander.messages(queries, journaled(expander, None, path, "before warm start"))
        rows = positive_rows(data, messages, models.generator.chat_text)
        most = run.config.expansion.max_new_tokens
        settings = dataclasses.replace(
            run.config.dpo, epochs=1.0, dev_share=0.0, response_length=most
        )
        return train_generator(
            run, models, None, rows, round_=0, name="warm-start", objective=WARM_START,
            settings=settings,
        )  # fmt: skip


def positive_rows(
    data: TrainingData, messages: Mapping[str, str], chat_text: Callable[[str], str]
) -> list[dict[str, str]]:
    """A row for each relevant document of a query, for `WARM_START`.

    Args:
        data: Its `generator_train` are the queries.
        messages: Query id -> what the generator is asked.
        chat_text: The prompt that a message becomes.
    """
    return [
        {
            "query_id": query,
            "prompt": chat_text(messages[query]),
            "response": data.collection.corpus[document],
        }
        for query in data.generator_train
        for document in data.positives(query)
    ]
