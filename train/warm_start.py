"""Before step B: the generator learns what a search finds relevant documents by, if asked to."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from expandr_jax.config import Config
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, journaled
from expandr_jax.objectives.objective import Objective
from expandr_jax.objectives.reward_sft import REWARD_SFT
from expandr_jax.objectives.settings import DpoSettings
from expandr_jax.objectives.warm_start import WARM_START, positive_rows
from expandr_jax.pair import GeneratorModel
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever
from train.generator import train_generator
from train.preferences import best_groups
from train.scores import RewardTools

# What the directory of its files in the workdir and its checkpoints are called.
WARM_START_NAME = "warm-start"


def warm_start(
    run: Run,
    models: GeneratorModel,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    tools: RewardTools,
) -> Any | None:
    """The adapter that training begins with, as `warm_start` has it; None for a new one.

    One pass over the queries of step B; the rest is as section dpo says. "positives": by the
    likelihood of the first `expansion.max_new_tokens` tokens of each relevant document. "best":
    candidates are sampled and rewarded as in step B, and a query's best ones are learned, alike,
    where they are worth more than 0.
    """
    how = run.config.warm_start
    if not how:
        return None
    with run.phase("warm start"):
        if how == "positives":
            path = run.path("work", f"{WARM_START_NAME}.jsonl")
            rows, objective, settings = _positives(run.config, models, expander, data, path)
        else:
            rows = _best(run, models, expander, retriever, data, tools)
            objective = dataclasses.replace(REWARD_SFT, name="warm start")
            settings = run.config.dpo
        settings = dataclasses.replace(settings, epochs=1.0, dev_share=0.0)
        return train_generator(
            run,
            models,
            None,
            rows,
            round_=0,
            name=WARM_START_NAME,
            objective=objective,
            section="dpo",
            settings=settings,
        )


def _positives(
    config: Config,
    models: GeneratorModel,
    expander: Expander,
    data: TrainingData,
    path: pathlib.Path,
) -> tuple[Sequence[Any], Objective, DpoSettings]:
    """What is learned of relevant documents; `path` has what is asked before its last question."""
    queries = {query: data.collection.queries[query] for query in data.generator_train}
    messages = expander.messages(queries, journaled(expander, None, path, "before warm start"))
    most = config.expansion.max_new_tokens
    settings = dataclasses.replace(config.dpo, response_length=most)
    return positive_rows(data, messages, models.generator.chat_text), WARM_START, settings


def _best(
    run: Run,
    models: GeneratorModel,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    tools: RewardTools,
) -> Sequence[Any]:
    """The best texts of each query that has one worth more than 0."""
    best, total = best_groups(
        run, models.generator, expander, retriever, data, WARM_START_NAME, tools
    )
    run.reporter.say(f"{len(best)} of {total} queries have a text that is worth more than 0")
    if not best:
        raise UserError(
            "warm_start 'best': no text of any query is worth more than 0, so there is nothing to "
            "learn; sample more (section candidates), or set warm_start to 'positives' or ''"
        )
    return best
