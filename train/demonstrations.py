"""The examples that prompts of candidates show: written by the generator, chosen on dev."""

import dataclasses
import pathlib

import numpy as np

from expandr_jax.data.training_data import TrainingData, limit_queries
from expandr_jax.errors import UserError
from expandr_jax.expansion.demonstrations import Demonstration, best_draws, draw_examples
from expandr_jax.expansion.expand import Expander, requests_of
from expandr_jax.expansion.sampled import sample_texts
from expandr_jax.files.records import read_jsonl, write_jsonl
from expandr_jax.objectives.rollouts import Score
from expandr_jax.objectives.scores import make_score
from expandr_jax.pair import GeneratorModel
from expandr_jax.rewards.evidence import RewardContext
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.registry import needs_vectors
from expandr_jax.rewards.sampled import sampled_candidates
from expandr_jax.rewards.settings import CandidatesSettings
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever
from train.preferences import best_groups
from train.scores import RewardTools, reward_context

DEMONSTRATIONS = "demonstrations"  # Its files in the workdir.
CHOSEN_PROMPTS = f"{DEMONSTRATIONS}/prompts.jsonl"


def with_demonstrations(
    run: Run,
    models: GeneratorModel,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    tools: RewardTools,
) -> Expander:
    """The expander with the prompts that candidates are sampled with, if the config wants any.

    Some of step B's queries get candidates of the plain prompt, whose best texts, where worth more
    than 0, are examples. Draws of them make prompts, of which those are kept whose texts for some
    dev queries are worth the most. Writes demonstrations/candidates.jsonl and prompts.jsonl.

    Raises:
        UserError: No text is worth more than 0, or there are no dev queries.
    """
    settings = run.config.demonstrations
    if not settings.prompts:
        return expander
    if not run.checksums.intact(CHOSEN_PROMPTS):
        with run.phase("examples for prompts"):
            _choose(run, models, expander, retriever, data, tools)
    rows = [row for _, row in read_jsonl(run.path(CHOSEN_PROMPTS), {}) if row["chosen"]]
    return dataclasses.replace(
        expander, examples=tuple(tuple(Demonstration(**e) for e in row["examples"]) for row in rows)
    )


def _choose(
    run: Run,
    models: GeneratorModel,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    tools: RewardTools,
) -> None:
    config, settings = run.config, run.config.demonstrations
    dev = limit_queries([*data.collection.qrels["dev"]], settings.queries)
    if not dev:
        raise UserError("demonstrations.prompts: there are no dev queries to choose prompts on")
    own = limit_queries(data.generator_train, settings.queries)
    some = dataclasses.replace(data, generator_train=own)
    best, total = best_groups(
        run, models.generator, expander, retriever, some, DEMONSTRATIONS, tools
    )
    pool = [Demonstration(g.query_id, g.query, g.candidates[0].text) for g in best]
    if not pool:
        raise UserError(
            f"demonstrations.prompts: no text of {total} queries is worth more than 0, so "
            "there is no example; raise demonstrations.queries or set demonstrations.prompts to 0"
        )
    draws = draw_examples(pool, settings.examples, settings.draws, config.seed)
    shown = dataclasses.replace(expander, examples=draws)
    corpus = retriever.corpus if needs_vectors(config.reward) else None
    limits = len(dev), config.candidates.max_new_tokens
    context = reward_context(config, tools, data, corpus, dev, *limits, split="dev")
    score = make_score(context, retriever, config.expansion.kind, run.processes)
    path = run.path("work", DEMONSTRATIONS, "dev.jsonl")
    rewards = _rewards(shown, context, score, config.candidates, path)
    chosen = best_draws(rewards, settings.prompts)
    rows = [
        {
            "examples": [dataclasses.asdict(example) for example in draws[number]],
            "dev_reward": float(rewards[:, number].mean()),
            "chosen": rank < len(chosen),
        }
        for rank, number in enumerate(best_draws(rewards, len(draws)))
    ]
    means = rewards.mean(axis=0)
    run.reporter.say(
        f"{len(pool)} examples; mean reward of {len(draws)} prompts on {len(dev)} dev queries: "
        f"{means.min():.4f} to {means.max():.4f}, {means[chosen].mean():.4f} of the "
        f"{len(chosen)} that are kept"
    )
    run.processes.once(lambda: write_jsonl(run.path(CHOSEN_PROMPTS), rows))
    run.checksums.record(CHOSEN_PROMPTS)


def _rewards(
    expander: Expander,
    context: RewardContext,
    score: Score,
    settings: CandidatesSettings,
    path: pathlib.Path,
) -> np.ndarray:
    """[queries, prompts] what a text of each of the expander's prompts is worth for the queries.

    These are the context's. The texts are kept in a file of this path.
    """
    data, count = context.data, len(expander.examples)
    queries = {query: data.collection.queries[query] for query in context.queries}
    temperatures = [settings.temperatures[0]] * count
    requests = expander.shown(queries, requests_of(settings, queries, temperatures))
    texts = sample_texts(
        expander.sampler, None, requests, path=path, purpose=f"{DEMONSTRATIONS}, dev"
    )

    groups = [
        Group(
            query, text, data.positives(query, context.split)[0], "",
            sampled_candidates(texts, query, temperatures, context.settings),
        )
        for query, text in queries.items()
    ]  # fmt: skip
    rewarded, _ = score(groups)
    return np.array([[c.total for c in group.candidates] for group in rewarded])
