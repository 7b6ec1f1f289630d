"""The objective of a warm start: to write what relevant documents begin with."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from expandr_jax.data.training_data import TrainingData
from expandr_jax.files.stored_rows import StoredRows
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.packing import Example
from expandr_jax.objectives.reward_sft import REWARD_SFT
from expandr_jax.objectives.settings import DpoSettings

WARM_STARTS = ("positives", "best")  # What `warm_start` takes, beside "" for none.


def beginning_tokenizer(
    generator: Generator, _: Sequence[Any], settings: DpoSettings
) -> Callable[[int, Mapping[str, Any]], tuple[list[Example], int]]:
    """Rows {"prompt", "response", "query_id"} to examples of one response: `Objective.tokenizer`.

    A response that is longer than the limit is left open: it does not end there.
    """

    def make(_: int, row: Mapping[str, Any]) -> tuple[list[Example], int]:
        prompt, response = generator.token_ids([row["prompt"], row["response"]])
        cut = len(prompt) > settings.prompt_length
        if len(response) < settings.response_length:
            response, _ = generator.response_ids(response, settings.response_length)
        ids, responses = prompt[-settings.prompt_length :], response[: settings.response_length]
        return [Example(ids, (responses,), {"weight": 1.0}, row["query_id"])], cut

    return make


WARM_START = dataclasses.replace(
    REWARD_SFT,
    name="warm start",
    rows="relevant documents",
    examples="relevant documents",
    tokenizer=beginning_tokenizer,
    prompt=operator.itemgetter("prompt"),
    texts=operator.itemgetter("prompt", "response"),
    count=lambda row, settings: 1,
)


def positive_rows(
    data: TrainingData, messages: Mapping[str, str], chat_text: Callable[[str], str]
) -> Sequence[dict[str, str]]:
    """A row for each relevant document of a query, for `WARM_START`.

    Args:
        data: Its `generator_train` are the queries.
        messages: Query id -> what the generator is asked.
        chat_text: The prompt that a message becomes.
    """
    rows = (
        {
            "query_id": query,
            "prompt": chat_text(messages[query]),
            "response": data.collection.corpus[document],
        }
        for query in data.generator_train
        for document in data.positives(query)
    )
    return StoredRows(rows, "relevant documents")
