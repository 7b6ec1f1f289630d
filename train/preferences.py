"""From sampled candidates to preference pairs: self-answers, rewards, the filter, the pairs."""

import collections
import contextlib
import dataclasses
import functools
from array import array
from collections.abc import Sequence
from typing import Any

from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.expand import Expander
from expandr_jax.files.records import open_jsonl
from expandr_jax.files.stored_rows import Picked
from expandr_jax.models.generator import Generator
from expandr_jax.objectives.reward_sft import read_groups
from expandr_jax.rewards.functions import RewardFunction, load_functions
from expandr_jax.rewards.group import Group
from expandr_jax.rewards.sampled import (
    SampledGroups,
    in_words,
    reward_in_blocks,
    sample_candidates,
    self_answers,
)
from expandr_jax.rewards.search import queries_at_once
from expandr_jax.rewards.selection import REASONS, best_alone, select_pairs
from expandr_jax.runtime.code import keep_code, note_failure
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever
from train.scores import RewardTools, reward_context

CANDIDATES_FILE = "candidates.jsonl"  # A round's texts with their rewards.


def run_functions(run: Run, used: bool) -> tuple[RewardFunction, ...]:
    """The functions of `reward.functions`, imported, whose code config.json tells ever after.

    Those of a run that has `used` them stay as they were, unless they have failed: then they may be
    mended, and what they rewarded before stays. All processes call it together.
    """
    path, functions = run.path("config.json"), load_functions(run.config.reward.functions)
    hashes = {function.module: function.sha256 for function in functions}
    replace = run.processes.is_main and not used
    for module in run.processes.main_first(lambda: keep_code(path, hashes, replace)):
        run.reporter.say(f"{module} has changed since it failed; what it rewarded before stays")

    def noted(function: RewardFunction) -> RewardFunction:
        note = functools.partial(note_failure, path, function.module, function.sha256)
        return dataclasses.replace(function, failed=note)

    return tuple(map(noted, functions))


def best_groups(
    run: Run,
    generator: Generator,
    expander: Expander,
    retriever: CorpusRetriever,
    data: TrainingData,
    directory: str,
    tools: RewardTools,
) -> tuple[Sequence[Group], int]:
    """The groups of `make_preferences` that have a text worth more than 0, with their best alone.

    Returns:
        They, and how many groups there are.
    """
    make_preferences(run, generator, expander, None, retriever, data, directory, tools)
    path, config = run.path(directory, CANDIDATES_FILE), run.config
    groups, _ = read_groups(path, generator, config.dpo, config.expansion, own=True)
    kept = array("q", (number for number, group in enumerate(groups) if best_alone(group)))
    return Picked(groups, kept, best_alone), len(groups)


def make_preferences(
    run: Run,
    generator: Generator,
    expander: Expander,
    adapter: Any | None,
    retriever: CorpusRetriever,
    data: TrainingData,
    directory: str,
    tools: RewardTools,
) -> None:
    """Writes candidates.jsonl and preferences.jsonl to a directory of the workdir, as "round-0"."""
    config, what = run.config, in_words(directory)
    files = [f"{directory}/{name}" for name in (CANDIDATES_FILE, "preferences.jsonl")]
    if run.checksums.intact(*files):
        return
    corpus = retriever.corpus  # All processes encode it, as a phase of its own.
    work = run.path("work", directory)
    with run.phase(f"candidates, {what}"):
        texts = sample_candidates(expander, adapter, data, config.candidates, work)
    with run.phase(f"self-answers, {what}"):
        answers = self_answers(expander.sampler, adapter, data, config.answer, work)
    with run.phase(f"rewards, {what}"):
        temperatures = config.candidates.all_temperatures
        sampled = SampledGroups(data, *texts, answers, temperatures, generator.chat_text)
        limits = queries_at_once(len(temperatures)), config.candidates.max_new_tokens
        context = reward_context(config, tools, data, corpus, sampled.ids, *limits)
        # Others' prompts are given by the query alone.
        shows_more = not expander.strategy.asks[-1].prompt.of_query_alone
        counts: collections.Counter[str] = collections.Counter()
        writers: list[Any] = []

        def take(groups: list[Group]) -> None:
            writers[0](group.to_row(shows_more) for group in groups)
            pairs, lacking = select_pairs(groups, config.reward.threshold)
            writers[1](pairs)
            counts.update(lacking, made=len(pairs))

        kind, paths = config.expansion.kind, [run.path(name) for name in files]
        with contextlib.ExitStack() as stack:
            if run.processes.is_main:
                writers += [stack.enter_context(open_jsonl(path)) for path in paths]
            reward_in_blocks(sampled, context, retriever, kind, f"rewards, {what}", take)
        dropped = ", ".join(f"{counts[reason]} {reason}" for reason in REASONS)
        said = f"{counts['made']} pairs of {len(sampled.ids)} queries; dropped: {dropped}"
        run.processes.once(lambda: run.reporter.say(said))
        retriever.release()
        run.checksums.record(*files)
