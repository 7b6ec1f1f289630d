"""Expansions of a run's queries, by the config's strategy, with passages of its own corpus."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.expansion.counted import texts_with_counts
from expandr_jax.expansion.expand import (
    Expander,
    SearchTexts,
    by_sample,
    journaled,
    make_expander,
)
from expandr_jax.expansion.sampled import MadeWhenAsked, SampledTexts
from expandr_jax.expansion.strategies import STRATEGIES, Ask, Strategy
from expandr_jax.files.records import write_json, write_jsonl
from expandr_jax.generation.requests import Requests
from expandr_jax.loading import make_sampler
from expandr_jax.pair import Models
from expandr_jax.ranking.ranker import Expansions
from expandr_jax.ranking.systems import EXPANSION, System, parse_systems, read_by_a_gate
from expandr_jax.runtime.run import Run
from expandr_jax.search import Index
from expandr_jax.search.divided import found_by_all

RANKED_SPLITS = ("dev", "test")
# In expansions.jsonl.
EXPANSION_FIELDS = "query_id", "split", "system", "sample", "query", "expansion"


def run_expander(
    run: Run,
    models: Models,
    data: TrainingData,
    bm25: Callable[[], Index],
    dense: SearchTexts,
) -> Expander:
    """Expands queries of a run by the config's strategy, in all processes.

    `bm25` is `run_words`'s, which process 0 alone asks; the rest is as of `make_expander`.
    """

    def words(queries: Sequence[str], k: int) -> tuple[np.ndarray, np.ndarray]:
        shares = run.path("work", "shares")
        return found_by_all(lambda: bm25().search(queries, k), run.processes, shares)

    sampler = make_sampler(models, run.config, run.processes, run.reporter, run.path("work"))
    config, collection = run.config, data.collection
    return make_expander(
        config.expansion,
        sampler,
        collection.corpus,
        words,
        dense,
        most_characters=config.answer.max_characters,
        drop_identical_ids=config.evaluation.drop_identical_ids,
        excluded=collection.excluded,
    )


def training_expansions(
    run: Run, data: TrainingData, expander: Expander, adapter: Any, round_: int
) -> Mapping[str, list[str]]:
    """Query id -> expansions of step A's queries, read when they are asked for.

    Writes round-R/expansions.jsonl, which a restart that finds the same texts leaves as it is.
    """
    config, queries = run.config.expansion, data.collection.queries
    journal = run.path("work", f"round-{round_}", "expansions.jsonl")
    strip = config.strip_train_lead_ins
    sample = journaled(expander, adapter, journal, f"expansions, round {round_}", strip)
    asked = {query: queries[query] for query in data.retriever_train}
    used: list[str] = []  # What tells the texts of each step from others.

    def kept(step: Ask, requests: Requests) -> SampledTexts:
        made = sample(step, requests)
        used.append(made.key)
        return made

    made = expander.texts(asked, config.train_samples, kept)
    texts = MadeWhenAsked(asked, lambda query: by_sample(made[query]))
    rows = (
        (query, "train", "expandr", number, queries[query], text)
        for query in sorted(texts)
        for number, text in enumerate(texts[query])
    )
    name, noted = f"round-{round_}/expansions.jsonl", f"work/round-{round_}/expansions.made.json"

    def write() -> None:
        same = run.checksums.unchanged(name, noted) and run.read_json(run.path(noted))["of"] == used
        if not same:
            _write(run.path(name), EXPANSION_FIELDS, rows)
            write_json(run.path(noted), {"of": used})
            run.checksums.record(name, noted)

    run.processes.once(write)
    return texts


def _write(path: pathlib.Path, fields: Sequence[str], rows: Iterable[tuple]) -> None:
    """Writes a file of JSON lines; each row has its fields in their order."""
    write_jsonl(path, (dict(zip(fields, row, strict=True)) for row in rows))


def evaluation_expansions(
    run: Run,
    data: TrainingData,
    own: Expander,
    adapters: Mapping[str, Any],
    systems: Sequence[System],
    folder: str,
) -> dict[tuple[str, str, str], Expansions]:
    """Expands dev and test queries for systems.

    Writes evaluation/expansions.jsonl, and evaluation/tokens.jsonl, how many tokens each text took.

    Every generator draws with the same numbers, so that a difference between two is theirs.

    Args:
        run, data: Whose queries are expanded.
        own: Expands by the config's strategy.
        adapters: Name of a generator -> its adapter.
        systems: Whose leaves are expanded.
        folder: "tests/NAME" for a further collection; "": the run's own data.

    Returns:
        (split, generator, strategy) -> what was written for the split's queries.
    """
    qrels, queries = data.collection.qrels, data.collection.queries
    leaves = {leaf.name: leaf for system in systems for leaf in system.leaves if leaf.strategy}
    made = {
        (generator, name): written_for(run, data, own, adapters[generator], generator, name, folder)
        for generator, name in dict.fromkeys((o.generator, o.strategy) for o in leaves.values())
    }
    asked = [
        (query, split, leaf) for leaf in leaves.values() for split in RANKED_SPLITS
        for query in qrels[split]
    ]  # fmt: skip
    texts = (
        (query, split, leaf.name, number, queries[query], text)
        for query, split, leaf in asked
        for number, text in enumerate(by_sample(made[leaf.generator, leaf.strategy][1][query]))
    )
    directory = run.path(folder, "evaluation")
    run.processes.once(lambda: _write(directory / "expansions.jsonl", EXPANSION_FIELDS, texts))
    counts = (
        (query, split, leaf.name, number, count)
        for query, split, leaf in asked
        for number, count in enumerate(by_sample(made[leaf.generator, leaf.strategy][2][query]))
    )
    fields = *EXPANSION_FIELDS[:4], "tokens"
    run.processes.once(lambda: _write(directory / "tokens.jsonl", fields, counts))
    return {
        (split, *key): Expansions(
            strategy,
            [texts[query] for query in qrels[split]],
            [told[query] for query in qrels[split]] if told is not None else None,
        )
        for key, (strategy, texts, _, told) in made.items()
        for split in RANKED_SPLITS
    }


def written_for(
    run: Run,
    data: TrainingData,
    own: Expander,
    adapter: Any,
    generator: str,
    name: str,
    folder: str = "",
) -> tuple[
    Strategy,
    Mapping[str, list[list[str]]],
    Mapping[str, list[list[int]]],
    Mapping[str, list[list[float]]] | None,
]:
    """What a generator writes for the dev and test queries by a strategy.

    Query id -> texts [asks][samples], to how many tokens it wrote for each, and to the means of
    their log-probabilities; None in place of these where nobody reads or has them. Arguments are
    as of `evaluation_expansions`, `name` as of `System.strategy`.
    """
    expander, strategy = own, own.strategy.in_a_run
    systems = parse_systems(run.config.evaluation.systems)
    if read_by_a_gate(systems, generator, name):
        sampler = dataclasses.replace(own.sampler, log_probs=True)
        own = expander = dataclasses.replace(own, sampler=sampler)
    where, what = generator, f"{generator} generator"
    if name != EXPANSION:
        strategy = STRATEGIES[name]
        expander = dataclasses.replace(own, strategy=strategy)
        where, what = f"{generator}-{name}", f"{what}, {name}"
    if folder:
        what = f"{data.collection.name}, {what}"
    qrels, known = data.collection.qrels, data.collection.queries
    queries = {query: known[query] for split in RANKED_SPLITS for query in qrels[split]}
    with run.phase(f"expansions for evaluation, {what}"):
        journal = run.path("work", folder, f"evaluation-{where}.jsonl")
        purpose = "evaluation" if name == EXPANSION else f"evaluation, {name}"
        sample = journaled(expander, adapter, journal, purpose)
        samples = max(run.config.evaluation.samples)
        return strategy, *texts_with_counts(expander, queries, samples, sample)
