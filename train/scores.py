"""What the rewards of a run are made with."""

import dataclasses
from collections.abc import Callable, Sequence

from expandr_jax.config import Config
from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.strategies import STRATEGIES
from expandr_jax.rewards.evidence import RewardContext
from expandr_jax.rewards.functions import RewardFunction
from expandr_jax.search import Bm25Index
from expandr_jax.vectors.corpus import Corpus


@dataclasses.dataclass(frozen=True)
class RewardTools:
    """What the rewards of a run have beside its retriever, its data and its settings.

    Attributes:
        words: Gives BM25's index of the corpus, as `run_words`.
        functions: Those of `reward.functions`, from `run_functions`.
    """

    words: Callable[[], Bm25Index]
    functions: Sequence[RewardFunction] = ()


def reward_context(
    config: Config,
    tools: RewardTools,
    data: TrainingData,
    corpus: Corpus | None,
    queries: Sequence[str],
    block: int,
    most_tokens: int,
    split: str = "train",
) -> RewardContext:
    """What candidates are judged by as a config says; the rest is as of `RewardContext`."""
    return RewardContext(
        settings=config.reward,
        seed=config.seed,
        strategy=STRATEGIES[config.expansion.strategy],
        drop_identical_ids=config.evaluation.drop_identical_ids,
        data=data,
        corpus=corpus,
        words=tools.words,
        queries=queries,
        block=block,
        most_tokens=most_tokens,
        split=split,
        functions=tools.functions,
    )
