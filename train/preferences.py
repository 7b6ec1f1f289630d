"""From sampled candidates to preference pairs: self-answers, rewards, the filter, the pairs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import UserError
from expandr_jax.expansion.expand import Expander, drawing, journaled, sample_texts
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.files.records import write_jsonl
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.models.generator import Generator
from expandr_jax.rewards.evidence import Evidence
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.registry import reward_groups
from expandr_jax.rewards.selection import REASONS, select_pairs
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import CorpusRetriever


def make_preferences(
    run: Run,
    generator: Generator,
    expander: Expander,
    adapter: Any | None,
    retriever: CorpusRetriever,
    data: TrainingData,
    round_: int,
) -> None:
    """Writes candidates.jsonl and preferences.jsonl of a round."""
    files = [f"round-{round_}/{name}.jsonl" for name in ("candidates", "preferences")]
    candidates_path, path = (run.path(name) for name in files)
    if run.checksums.intact(*files):
        return
    corpus = retriever.corpus  # All processes encode it, as a phase of its own.
    with run.phase(f"candidates, round {round_}"):
        prompts, candidates = _sample_candidates(run, expander, adapter, data, round_)
    with run.phase(f"self-answers, round {round_}"):
        answers = _self_answers(run, expander.sampler, adapter, data, round_)
    if not answers:
        raise UserError(
            f"round {round_}: the generator left every self-answer empty, twice; no query is left "
            "to learn from. Look at the model and at the section answer of the config"
        )
    with run.phase(f"rewards, round {round_}"):
        temperatures = _temperatures(run)
        groups = [
            Group(
                query,
                data.collection.queries[query],
                data.positive(query),
                answers[query],
                [Candidate(candidates[query, i], t) for i, t in enumerate(temperatures)],
                generator.chat_text(prompts[query]),
            )
            for query in data.generator_train
            if query in answers
        ]
        vectors = _encode(run, retriever, groups)
        # A query alone does not give a prompt that shows passages.
        shows_passages = "passages" in expander.strategy.asks[-1].prompt.fields

        def write() -> None:
            evidence = Evidence(run.config, groups, data, corpus, **vectors)
            rewarded = reward_groups(evidence, f"rewards, round {round_}")
            write_jsonl(candidates_path, (group.to_row(shows_passages) for group in rewarded))
            pairs, dropped = select_pairs(rewarded, run.config.reward.threshold)
            write_jsonl(path, pairs)
            counts = ", ".join(f"{dropped.get(reason, 0)} {reason}" for reason in REASONS)
            run.reporter.say(f"{len(pairs)} pairs of {len(groups)} queries; dropped: {counts}")

        run.processes.once(write)
        retriever.release()
        run.checksums.record(*files)


def _sample_candidates(
    run: Run, expander: Expander, adapter: Any, data: TrainingData, round_: int
) -> tuple[dict[str, str], dict[tuple[str, int], str]]:
    """Query id -> the message that it asks, and (query id, candidate) -> text."""
    queries = {query: data.collection.queries[query] for query in data.generator_train}
    path = run.path("work", f"round-{round_}", "candidates.jsonl")
    purpose = f"candidates, round {round_}"
    messages = expander.messages(queries, journaled(expander, adapter, path, purpose))
    requests = [
        Request(query, sample, message, temperature, **drawing(run.config.candidates))
        for query, message in messages.items()
        for sample, temperature in enumerate(_temperatures(run))
    ]
    texts = sample_texts(expander.sampler, adapter, requests, path=path, purpose=purpose)
    return messages, texts


def _temperatures(run: Run) -> list[float]:
    """The temperature of each of a query's candidates."""
    config = run.config.candidates
    return [t for t in config.temperatures for _ in range(config.per_temperature)]


def _self_answers(
    run: Run, sampler: Sampler, adapter: Any, data: TrainingData, round_: int
) -> dict[str, str]:
    """Query id -> answer; an empty one is tried once more, then its query is left out."""
    config = run.config.answer
    answers: dict[str, str] = {}
    for attempt in range(2):
        missing = [query for query in data.generator_train if query not in answers]
        if not missing:
            break
        requests = [
            Request(
                query,
                attempt,
                PROMPTS["q2a"].message(
                    data.collection.queries[query],
                    document=data.collection.corpus[data.positive(query)][: config.max_characters],
                ),
                config.temperature,
                **drawing(config),
            )
            for query in missing
        ]
        path = run.path("work", f"round-{round_}", f"answers-{attempt}.jsonl")
        purpose = f"answers, round {round_}, try {attempt}"
        texts = sample_texts(sampler, adapter, requests, path=path, purpose=purpose)
        answers |= {query: text for (query, _), text in texts.items() if text}
    return answers


def _encode(run: Run, retriever: CorpusRetriever, groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """Vectors of candidates [queries, candidates, dim], answers and queries [queries, dim]."""
    texts = [text for group in groups for text in group.texts]
    with run.reporter.progress("rewards: texts encoded", len(texts) + 2 * len(groups)) as advance:

        def encode(items: list[str], kind: str, what: str) -> np.ndarray:
            # An empty candidate has nothing in common with anything: its vector is zero.
            each = len(items) // max(1, len(groups))
            ids = [f"{what} {group.query_id}" for group in groups for _ in range(each)]
            vectors = retriever.encode(items, kind, ids, advance)
            return np.where([[bool(item)] for item in items], vectors, 0.0)

        candidates = encode(texts, "document", "candidates of")
        return {
            "candidates": candidates.reshape(len(groups), -1, candidates.shape[-1]),
            "answers": encode([group.answer for group in groups], "document", "answer to"),
            "queries": encode([group.query for group in groups], "query", "query"),
        }
