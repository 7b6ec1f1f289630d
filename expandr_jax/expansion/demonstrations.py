"""Prompts that show examples: several of them for one query make its texts differ.

An example is a query with a text that was good for it. LeReT (arXiv 2410.23214) samples a text a
prompt, each of which shows other examples, where others draw several texts of one prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np

from expandr_jax.expansion.prompts import Prompt
from expandr_jax.settings import MANY, count


@dataclasses.dataclass(frozen=True)
class DemonstrationsSettings:
    """The section `demonstrations`."""

    prompts: Annotated[int, count(0, MANY)]
    examples: Annotated[int, count(1, MANY)]
    draws: Annotated[int, count(1, MANY)]
    queries: Annotated[int, count(1, MANY)]


@dataclasses.dataclass(frozen=True)
class Demonstration:
    """A query, and a text that was good for it."""

    query_id: str
    query: str
    text: str


def draw_examples(
    pool: Sequence[Demonstration], size: int, draws: int, seed: int
) -> list[tuple[Demonstration, ...]]:
    """So many draws of `size` examples, or all there are, in an order; equal draws are one."""
    size = min(size, len(pool))
    made = (
        tuple(
            pool[i] for i in np.random.default_rng([seed, n]).choice(len(pool), size, replace=False)
        )
        for n in range(draws)
    )
    return [*dict.fromkeys(made)]


def message_with_examples(
    prompt: Prompt,
    examples: Sequence[Demonstration],
    query_id: str,
    query: str,
    fits: Callable[[str], bool],
) -> str:
    """The user's message for a query, after examples, each as it would be asked and answered.

    A query's own example is left out; so are the first ones as long as the message does not fit.
    """
    shown = [example for example in examples if example.query_id != query_id]
    while True:
        parts = [f"{prompt.message(example.query)} {example.text}" for example in shown]
        message = "\n\n".join([*parts, prompt.message(query)])
        if not shown or fits(message):
            return message
        shown = shown[1:]


def best_draws(rewards: np.ndarray, most: int) -> list[int]:
    """The numbers of the draws, best first, whose mean reward is highest; the lower one on ties.

    Args:
        rewards: [queries, draws] of a text that each draw's prompt gave for each query.
        most: How many at most.
    """
    order = np.argsort(-np.asarray(rewards, np.float64).mean(axis=0), kind="stable")
    return order[:most].tolist()
