"""From sampled candidates to preference pairs: self-answers, rewards, the filter, the pairs."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from expandr_jax.data.records import write_jsonl
from expandr_jax.data.training_data import TrainingData
from expandr_jax.errors import NotFiniteError, UserError
from expandr_jax.expansion.expand import Expander, drawing, journaled, sample_texts
from expandr_jax.expansion.prompts import PROMPTS
from expandr_jax.generation.requests import Request
from expandr_jax.generation.sampler import Sampler
from expandr_jax.models.pooling import l2_normalize
from expandr_jax.pair import Models
from expandr_jax.ranking.dense import fuse
from expandr_jax.rewards import ranks as rewards
from expandr_jax.rewards.search import corpus_reward, group_reward, judged_documents
from expandr_jax.runtime.run import Run
from expandr_jax.vectors.corpus import Corpus, encode_texts


def make_preferences(
    run: Run,
    models: Models,
    expander: Expander,
    adapter: Any | None,
    retriever_params: Any,
    corpus: Corpus,
    data: TrainingData,
    round_: int,
) -> None:
    """Writes candidates.jsonl and preferences.jsonl of a round."""
    files = [f"round-{round_}/{name}.jsonl" for name in ("candidates", "preferences")]
    candidates_path, path = (run.path(name) for name in files)
    if not run.seals.intact(*files):
        with run.phase(f"candidates, round {round_}"):
            prompts, candidates = _sample_candidates(run, expander, adapter, data, round_)
        with run.phase(f"self-answers, round {round_}"):
            answers = _self_answers(run, expander.sampler, adapter, data, round_)
        if not answers:
            raise UserError(
                f"round {round_}: the generator left every self-answer empty, twice; no query is "
                "left to learn from. Look at the model and at the section answer of the config"
            )
        with run.phase(f"rewards, round {round_}"):
            encoded = _encode(run, models, retriever_params, data, candidates, answers)

            def write() -> None:
                rows = _score(run, corpus, data, candidates, answers, encoded, round_)
                prompted = {query: models.generator.chat_text(prompts[query]) for query in answers}
                write_jsonl(candidates_path, _with_prompts(expander, rows, prompted))
                write_jsonl(path, _select(run, prompted, rows))

            run.processes.once(write)
            run.seals.seal(*files)


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


def _with_prompts(
    expander: Expander, rows: list[dict[str, Any]], prompts: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of candidates.jsonl, with the prompts where a query alone does not give them."""
    if "passages" not in expander.strategy.asks[-1].prompt.fields:
        return rows
    return [{**row, "prompt": prompts[row["query_id"]]} for row in rows]


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


def _encode(
    run: Run,
    models: Models,
    params: Any,
    data: TrainingData,
    candidates: Mapping[tuple[str, int], str],
    answers: Mapping[str, str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of candidates [queries, candidates, dim], answers and queries [queries, dim]."""
    count = len(_temperatures(run))
    queries = [query for query in data.generator_train if query in answers]
    flat = [candidates[query, i] for query in queries for i in range(count)]
    with run.progress("rewards: texts encoded", len(flat) + 2 * len(queries)) as advance:

        def encode(items: list[str], kind: str, what: str) -> np.ndarray:
            # An empty candidate has nothing in common with anything: its vector is zero.
            each = len(items) // max(1, len(queries))
            ids = [f"{what} {query}" for query in queries for _ in range(each)]
            vectors = encode_texts(run, models, params, items, kind, advance, ids=ids)
            return np.where([[bool(item)] for item in items], vectors, 0.0)

        return (
            encode(flat, "document", "candidates of").reshape(len(queries), count, -1),
            encode([answers[query] for query in queries], "document", "answer to"),
            encode(data.queries(queries), "query", "query"),
        )


def _score(
    run: Run,
    corpus: Corpus,
    data: TrainingData,
    candidates: Mapping[tuple[str, int], str],
    answers: Mapping[str, str],
    encoded: tuple[np.ndarray, np.ndarray, np.ndarray],
    round_: int,
) -> list[dict[str, Any]]:
    """Rows of candidates.jsonl: similarities, ranks and rewards of every candidate.

    `encoded` is what `_encode` returns.
    """
    config = run.config
    temperatures = _temperatures(run)
    count = len(temperatures)
    queries = [query for query in data.generator_train if query in answers]
    texts = [[candidates[query, i] for i in range(count)] for query in queries]
    flat = [text for row in texts for text in row]
    candidate_vectors, answer_vectors, query_vectors = encoded
    place = {document: i for i, document in enumerate(corpus.ids)}
    positives = np.array([place[data.positive(query)] for query in queries])
    normalized = jax.jit(l2_normalize)
    candidate_units, positive_units, answer_units = (
        np.asarray(normalized(x))
        for x in (candidate_vectors, corpus.vectors[positives], answer_vectors)
    )
    similarity_positive = np.einsum("qcd,qd->qc", candidate_units, positive_units)
    similarity_answer = np.einsum("qcd,qd->qc", candidate_units, answer_units)
    rank_positive = rewards.ranks(similarity_positive)
    rank_answer = rewards.ranks(similarity_answer)
    terms = {
        "positive": rewards.reciprocal_rank(rank_positive),
        "answer": rewards.reciprocal_rank(rank_answer),
    }
    if config.reward.corpus > 0 or config.reward.group > 0:
        fused = fuse(
            np.repeat(query_vectors, count, axis=0),
            candidate_vectors.reshape(len(flat), 1, -1),
            np.array([[bool(text)] for text in flat]),
            query_weight=config.reward.query_weight,
            normalize=config.contrastive.normalize,
        )
        fused = np.asarray(fused).reshape(len(queries), count, -1)
        judged = judged_documents(data, queries, place)
        if config.reward.corpus > 0:
            terms["corpus"] = corpus_reward(config, corpus.index, fused, judged)
        if config.reward.group > 0:
            terms["group"] = group_reward(config, corpus.vectors, fused, judged)
    weights = rewards.RewardWeights(
        positive=config.reward.positive,
        answer=config.reward.answer,
        corpus=config.reward.corpus,
        group=config.reward.group,
    )
    total = rewards.total_reward(terms, weights)
    finite = np.isfinite(total).all(axis=1)
    if not finite.all():
        bad = [query for query, right in zip(queries, finite, strict=True) if not right]
        raise NotFiniteError(
            f"rewards, round {round_}: not finite for queries {', '.join(bad)}; the retriever's "
            "weights are damaged or training diverged"
        )
    return [
        {
            "query_id": query,
            "query": data.collection.queries[query],
            "positive_id": corpus.ids[positives[q]],
            "answer": answers[query],
            "candidates": [
                {
                    "text": texts[q][c],
                    "temperature": temperatures[c],
                    "similarity_positive": float(similarity_positive[q, c]),
                    "similarity_answer": float(similarity_answer[q, c]),
                    "rank_positive": int(rank_positive[q, c]),
                    "rank_answer": int(rank_answer[q, c]),
                    "reward": float(total[q, c]),
                    "reward_terms": {name: float(value[q, c]) for name, value in terms.items()},
                }
                for c in range(count)
            ],
        }
        for q, query in enumerate(queries)
    ]


def _select(
    run: Run, prompts: Mapping[str, str], rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of preferences.jsonl: the pairs that pass the filter; `prompts` by query id."""
    config = run.config
    pairs, unlike, same, unclear = [], 0, 0, 0
    for row in rows:
        candidates = row["candidates"]
        columns = {
            name: np.array([candidate[name] for candidate in candidates])
            for name in ("similarity_positive", "similarity_answer", "reward")
        }
        if not rewards.passes_similarity_filter(
            columns["similarity_positive"], columns["similarity_answer"], config.reward.threshold
        ):
            unlike += 1
            continue
        pair = rewards.select_pair(columns["reward"], [c["text"] for c in candidates])
        if pair is None:
            same += 1
            continue
        chosen, rejected = (candidates[i] for i in pair)
        if not chosen["text"] or not rejected["text"]:
            unclear += 1
            continue
        pairs.append(
            {
                "prompt": prompts[row["query_id"]],
                "chosen": chosen["text"],
                "rejected": rejected["text"],
                "query_id": row["query_id"],
                "reward_chosen": chosen["reward"],
                "reward_rejected": rejected["reward"],
            }
        )
    run.console.print(
        f"  {len(pairs)} pairs of {len(rows)} queries; dropped: {unlike} below the similarity "
        f"threshold, {same} with nothing preferred, {unclear} with an empty side"
    )
    return pairs
