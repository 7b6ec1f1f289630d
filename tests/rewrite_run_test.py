"""Rewrite-Retrieve-Read: the text replaces the query, and what hits is learned first."""

import json

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from expandr_jax.files.records import read_jsonl
from expandr_jax.rewards.group import Candidate, Group
from expandr_jax.rewards.selection import best_alone
from tests.commands import finish, start, step_metrics

TOPICS = ("stars", "tides", "rocks", "birds", "trees", "rivers", "clouds", "moons")
DEPTH = 3


def group_of(*texts_and_rewards):
    candidates = [Candidate(text, total=reward) for text, reward in texts_and_rewards]
    return Group("q", "query", "d", "", candidates)


def test_a_query_s_best_texts_are_those_that_hit():
    found = best_alone(group_of(("a", 0.0), ("b", 1.0), ("", 1.0), ("c", 1.0)))
    assert found.texts == ["b", "c"]
    assert best_alone(group_of(("a", 0.25), ("b", 0.5))).texts == ["b"]
    assert best_alone(group_of(("a", 0.0), (" ", 1.0))) is None
    assert best_alone(group_of(("a", -1.0))) is None


@pytest.fixture
def collection(tmp_path):
    """Two documents and five queries a topic, which have answers."""
    directory = tmp_path / "topics"
    (directory / "qrels").mkdir(parents=True)
    documents = [
        {"_id": f"{topic}-{i}", "text": f"{topic} are number {i} of {at} in the list"}
        for at, topic in enumerate(TOPICS)
        for i in range(2)
    ]
    queries = [
        {"_id": f"{topic}?{i}", "text": f"where do {topic} stand {i}", "answers": [f"{topic} are"]}
        for topic in TOPICS
        for i in range(5)
    ]
    for name, rows in (("corpus", documents), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines)
    for split, numbers in (("train", range(3)), ("dev", [3]), ("test", [4])):
        rows = [f"{topic}?{i}\t{topic}-0\t1" for i in numbers for topic in TOPICS]
        text = "query-id\tcorpus-id\tscore\n" + "\n".join(rows) + "\n"
        (directory / "qrels" / f"{split}.tsv").write_text(text)
    return directory


@pytest.mark.slow
def test_what_hits_is_learned_before_grpo(collection, tmp_path):
    settings = {
        "data.kind": "beir", "data.path": str(collection), "expansion.strategy": "rewrite",
        "contrastive.query_weight": 0.0, "reward.query_weight": 0.0,
        "evaluation.query_weights": "(0.0,)", "warm_start": "best", "step_b": "grpo",
        "contrastive.batch_size": 2, "contrastive.epochs": 1.0,
        "reward.positive": 0.0, "reward.answer": 0.0, "reward.corpus": 1.0,
        "reward.corpus_measure": "hit", "reward.depth": DEPTH, "grpo.queries": 4,
        "grpo.samples": 4, "grpo.steps": 2, "grpo.max_new_tokens": 8,
    }  # fmt: skip
    overrides = [f"--config.{name}={value}" for name, value in settings.items()]
    run = tmp_path / "run"
    output = finish(start(run, *overrides))
    rows = [row for _, row in read_jsonl(run / "warm-start" / "candidates.jsonl", {})]
    model = SentenceTransformer("configs/tiny/tiny-bert", device="cpu")
    model.max_seq_length = 16
    corpus = [row for _, row in read_jsonl(run / "data" / "corpus.jsonl", {})]
    documents = model.encode([row["text"] for row in corpus], normalize_embeddings=True)
    checked = hits = 0
    for row in rows:
        topic = row["query_id"].partition("?")[0]
        texts = [c["text"] or row["query"] for c in row["candidates"]]
        scores = model.encode(texts, normalize_embeddings=True) @ documents.T
        order = np.argsort(-scores, axis=1)
        for c, ranked, score in zip(row["candidates"], order, scores, strict=True):
            if score[ranked[DEPTH - 1]] - score[ranked[DEPTH]] < 1e-5:
                continue  # Rounding decides.
            found = any(corpus[i]["_id"].startswith(topic) for i in ranked[:DEPTH])
            assert c["reward_terms"]["corpus"] == c["reward"] == found
            checked, hits = checked + 1, hits + found
    assert checked > hits > 0
    queries = sum(any(c["reward"] for c in row["candidates"]) for row in rows)
    assert f"{queries} of {len(rows)} queries have a text that is worth more than 0" in output
    phases = [row["phase"] for row in step_metrics(run)]
    assert phases.index("warm-start") < phases.index("retriever") < phases.index("GRPO")
